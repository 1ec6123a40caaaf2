"""
The Jacobi decoding loop, a `custom_generate` callable of `GenerationMixin.generate`.

The host prepares everything (ids, masks, cache, processors, stopping criteria) and calls `jacobi_decode`, which then
repeats: feed the anchor and a draft of `block_size - 1` tokens, commit what the model confirms plus its bonus token,
roll the cache back, slide the window. The prefill is the first iteration: its anchor is the last prompt token.

Sources: Jacobi decoding (arXiv 2305.10427), CLLM (arXiv 2403.00835).
"""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from .caches import recording
from .commit import Committer
from .output import JacobiOutput, JacobiStats
from .window import Window, check_positions


def jacobi_decode(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    *,
    block_size: int,
    streamer: BaseStreamer | None = None,
    num_given: int | None = None,
    is_user_cache: bool = False,
    **model_kwargs: Any,
) -> JacobiOutput | torch.Tensor:
    """
    Decode greedily, several tokens a forward, and return exactly the tokens of greedy decoding.

    Args:
        model (`transformers.PreTrainedModel`): a decoder-only model.
        input_ids (`torch.LongTensor` of shape `(batch_size, prompt_length)`): prompts, padded on the left; of length 0
            when the prompt comes as `inputs_embeds`.
        logits_processor (`transformers.LogitsProcessorList`): applied at every position before its argmax.
        stopping_criteria (`transformers.StoppingCriteriaList`): asked after every committed token.
        generation_config (`transformers.GenerationConfig`): the merged options of this call.
        block_size (`int`): positions checked in a forward; 1 is greedy decoding.
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
    window = Window(model, input_ids, block_size, num_given, is_user_cache, model_kwargs)
    committer = Committer(
        input_ids,
        logits_processor,
        stopping_criteria,
        generation_config.pad_token_id,
        streamer,
        # Such a model finds positions by counting cached tokens, which padding on the left would shift.
        same_length="position_ids" not in inspect.signature(model.forward).parameters,
    )
    check_positions(model, window.num_prompt + committer.max_length - input_ids.shape[1])
    stats = JacobiStats(num_committed=[[] for _ in range(batch_size)])
    with recording(window.cache):
        while window.rows:
            rows, num_generated = window.rows, list(committer.num_generated)
            # No row may look beyond the last position, so the foremost row sets how far a draft reaches.
            num_missing = committer.max_length - max(committer.lengths[row] for row in rows)
            draft_ids = window.draft_ids[:, : num_missing - 1]
            logits = window.forward(draft_ids)
            predicted_ids, counts = committer.commit(rows, draft_ids, logits)
            del logits  # large in the prefill
            window.advance(predicted_ids, counts, [committer.finished[row] for row in rows])
            stats.num_forwards += 1
            for row in rows:
                if committer.num_generated[row] > num_generated[row]:
                    stats.num_committed[row].append(committer.num_generated[row] - num_generated[row])
    if streamer is not None:
        streamer.end()

    sequences = committer.canvas[:, : max(committer.lengths)]
    if not generation_config.return_dict_in_generate:
        return sequences
    cache = window.cache if batch_size == 1 else None
    return JacobiOutput(sequences=cast(torch.LongTensor, sequences), past_key_values=cache, jacobi_stats=stats)
