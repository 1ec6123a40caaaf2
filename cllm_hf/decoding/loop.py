"""
The Jacobi decoding loop, a `custom_generate` callable of `GenerationMixin.generate`.

The host prepares everything (ids, masks, cache, processors, stopping criteria) and calls `jacobi_decode`, which then
repeats: feed the anchor and a draft of `block_size - 1` tokens, commit what the model confirms plus its bonus token,
roll the cache back, slide the window. The prefill is the first iteration: its anchor is the last prompt token.

Sources: Jacobi decoding (arXiv 2305.10427), CLLM (arXiv 2403.00835).
"""

from __future__ import annotations

from typing import Any, cast

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from ..options import JacobiOptions
from .commit import Committer, length_limit
from .output import JacobiOutput, JacobiStats
from .pacing import make_pace
from .sampling import GumbelNoise
from .window import Window


def jacobi_decode(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    *,
    options: JacobiOptions,
    context_ids: torch.Tensor | None = None,
    streamer: BaseStreamer | None = None,
    num_given: int | None = None,
    is_user_cache: bool = False,
    **model_kwargs: Any,
) -> JacobiOutput | torch.Tensor:
    """
    Decode several tokens a forward, and return exactly the tokens of decoding one at a time.

    Args:
        model (`transformers.PreTrainedModel`): a causal or an encoder-decoder model.
        input_ids (`torch.LongTensor` of shape `(batch_size, prompt_length)`): prompts, padded on the left; of length 0
            when the prompt comes as `inputs_embeds`.
        logits_processor (`transformers.LogitsProcessorList`): applied at every position before its argmax.
        stopping_criteria (`transformers.StoppingCriteriaList`): asked after every committed token.
        generation_config (`transformers.GenerationConfig`): the merged options of this call.
        options (`JacobiOptions`): block size and the like.
        context_ids (`torch.LongTensor` of shape `(batch_size, context_length)`, *optional*): tokens to draw the first
            draft from; by default the prompts.
        streamer (`transformers.generation.streamers.BaseStreamer`, *optional*): receives every committed token.
        num_given (`int`, *optional*): length of the attention mask that the user passed, cached tokens included.
        is_user_cache (`bool`): whether `past_key_values` comes from the user.
        model_kwargs: model inputs as the host prepared them, `past_key_values` among them.

    Returns:
        `JacobiOutput` if `return_dict_in_generate`, else `torch.LongTensor` of shape `(batch_size, sequence_length)`.

    Raises:
        ValueError: for a cache that cannot be rolled back or a model input that cannot be extended.
    """
    batch_size = input_ids.shape[0]
    pace = make_pace(model, options.block_size)
    window = Window(
        model,
        input_ids,
        model_kwargs,
        max_block_size=pace.max_block_size,
        num_new_tokens=length_limit(stopping_criteria, input_ids.shape[1]) - input_ids.shape[1],
        compile_options=generation_config if options.compile else None,
        context_ids=context_ids,
        num_given=num_given,
        is_user_cache=is_user_cache,
    )
    committer = Committer(
        input_ids,
        logits_processor,
        stopping_criteria,
        generation_config.pad_token_id,
        streamer,
        leave_together=window.memory.fixed_shape,
        same_length=window.same_length,
        noise=_noise(generation_config, input_ids, options.seed),
    )
    stats = JacobiStats(num_committed=[[] for _ in range(batch_size)])
    try:
        while window.rows:
            rows, num_generated = window.rows, list(committer.num_generated)
            # No row may look beyond the last position, so the foremost row sets how far a draft reaches.
            limit = committer.max_length - max(committer.lengths[row] for row in rows)
            if window.memory.fixed_shape:
                limit = pace.max_block_size
            drafts = window.draft(pace.block_size(len(rows), limit) - 1)
            logits = window.forward(drafts)
            predicted, counts = committer.commit(rows, drafts, logits)
            del logits  # large in the prefill
            window.advance(predicted, counts, [committer.finished[row] for row in rows])
            pace.record(len(drafts[0]) + 1, counts)
            stats.num_forwards += 1
            for row in rows:
                if committer.num_generated[row] > num_generated[row]:
                    stats.num_committed[row].append(committer.num_generated[row] - num_generated[row])
    finally:
        window.memory.close()
    if streamer is not None:
        streamer.end()

    sequences = committer.sequences()
    if not generation_config.return_dict_in_generate:
        return sequences
    # A recurrent state may lag behind the text, and the cache of a batch has lost the rows that finished.
    cache = window.memory.cache if batch_size == 1 and not window.memory.replays else None
    return JacobiOutput(sequences=cast(torch.LongTensor, sequences), past_key_values=cache, jacobi_stats=stats)


def _noise(generation_config: GenerationConfig, input_ids: torch.Tensor, seed: int | None) -> GumbelNoise | None:
    if not generation_config.do_sample:
        return None
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    return GumbelNoise(seed, input_ids.shape[0])
