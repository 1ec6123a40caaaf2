"""Responses that are judged but not timed: many at once, as many as fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from .._host import base_model_of
from ..blocks.drafter import find_drafter
from ..blocks.limits import check_packable
from ..journal import Journal
from ..trajectories.continuous import ContinuousBatch, count_rows
from ..trajectories.options import DEFAULT_TOKENS_PER_BATCH
from ..trajectories.responding import Fitting, batch_by_tokens, split_batches
from .benchmark import DecodingMethod, decode_all
from .progress import Progress


# Prompts that are decoded in one go, and kept: an interruption loses no more. While the last of them end, rows stand
# empty. A CPU, which decodes fewer rows at once, takes minutes for as many.
_PROMPTS_AT_ONCE, _PROMPTS_AT_ONCE_ON_CPU = 512, 128
# Of what `generate` pads in a batch; a GPU is busy with more.
_TOKENS_ON_ACCELERATORS = 4 * DEFAULT_TOKENS_PER_BATCH
# What in a generation config does not change greedy decoding.
_WITHOUT_EFFECT = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "transformers_version", "use_cache"),
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "max_length", "max_new_tokens", "decoding"),
    *("cache_implementation", "return_dict_in_generate", "output_scores", "output_logits"),
    *("output_attentions", "output_hidden_states"),
}


_Decode = Callable[[list[list[int]], Callable[[int], None]], list[list[int]]]


def decode_further(
    name: str,
    method: DecodingMethod,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    pad_token_id: int,
    batch_size: int | None,
    journal: Journal,
    progress: Progress,
) -> list[list[int]]:
    """
    Decode prompts greedily by the model of `generate()`, without compiling anything, in the order of the prompts.

    With a batch size that is what `generate` does in batches. Without one, rows that end make room for the next
    prompts; where the model does not take that, or its generation config asks for processors, batches of `generate`
    are as large as fits. A group of prompts is kept in the journal, under `name`, when it is done.
    """
    responses: list[list[int]] = []
    decode = _choose(method, max_new_tokens, pad_token_id, batch_size)
    size = _PROMPTS_AT_ONCE_ON_CPU if method.model.device.type == "cpu" else _PROMPTS_AT_ONCE
    with progress.stage(f"{method.name}, responses to judge", len(prompts)) as stage:
        for number, group in enumerate(split_batches(prompts, size)):
            part, key = f"responses-{name}-{number:05d}", [group, max_new_tokens, batch_size]
            is_kept, num_said = journal.has(part, key), 0

            def say(num_ended: int) -> None:
                nonlocal num_said
                stage.advance(num_ended - num_said)
                num_said = num_ended

            responses += journal.once(part, key, partial(decode, group, say))
            stage.advance(len(group) - num_said, is_kept)
    return responses


def _choose(method: DecodingMethod, max_new_tokens: int, pad_token_id: int, batch_size: int | None) -> _Decode:
    if batch_size is not None:
        return lambda group, say: decode_all(method, group, max_new_tokens, batch_size, pad_token_id, False)
    fitting = Fitting()
    if _is_plain(method.model):
        return lambda group, say: _decode_continuously(method, group, max_new_tokens, fitting, say)
    return lambda group, say: _decode_by_generate(method, group, max_new_tokens, pad_token_id, fitting, say)


def _is_plain(model: Any) -> bool:
    """Whether greedy decoding of a model is the plain argmax, by forward passes that can be packed."""
    base = base_model_of(model)
    changed = {name for name, value in base.generation_config.to_diff_dict().items() if value is not None}
    changed = {name for name in changed - _WITHOUT_EFFECT if not name.startswith(("_", "jacobi_"))}
    if changed or find_drafter(base) is not None:
        return False
    try:
        check_packable(base)
    except ValueError:
        return False
    return True


def _decode_continuously(
    method: DecodingMethod,
    prompts: list[list[int]],
    max_new_tokens: int,
    fitting: Fitting,
    say: Callable[[int], None],
) -> list[list[int]]:
    model = base_model_of(method.model)

    def decode(num_rows: int) -> list[list[int]]:
        batch = ContinuousBatch(model, max_new_tokens, method.stop_ids, num_rows, DEFAULT_TOKENS_PER_BATCH)
        return batch.run(prompts, say)

    return fitting.run(decode, count_rows(model, max(map(len, prompts)) + max_new_tokens))


def _decode_by_generate(
    method: DecodingMethod,
    prompts: list[list[int]],
    max_new_tokens: int,
    pad_token_id: int,
    fitting: Fitting,
    say: Callable[[int], None],
) -> list[list[int]]:
    is_cpu = method.model.device.type == "cpu"
    budget = DEFAULT_TOKENS_PER_BATCH if is_cpu else _TOKENS_ON_ACCELERATORS
    sizes = [(len(prompt), max_new_tokens) for prompt in prompts]
    responses: dict[int, list[int]] = {}
    for batch in batch_by_tokens(sizes, budget):
        chosen = [prompts[index] for index in batch]
        decode = partial(decode_all, method, chosen, max_new_tokens, pad_token_id=pad_token_id, show_progress=False)
        found = fitting.run(decode, len(batch))
        responses.update(zip(batch, found))
        say(len(responses))
    return [responses[index] for index in range(len(prompts))]
