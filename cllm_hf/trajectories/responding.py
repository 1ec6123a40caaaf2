"""The model's own greedy responses to prompts, and what goes into a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from .._host import input_device
from ..blocks.rules import count_until_stop


# Logits of a forward pass at most, so that a large vocabulary does not fill the memory: a gigabyte in float32.
_MOST_LOGITS = 2**28


def batch_by_tokens(sizes: Sequence[tuple[int, int]], budget: int) -> list[list[int]]:
    """
    Put items of similar size together, and return the indices of each batch.

    The two sizes of an item are padded apart in a batch. Padding included, it holds no more tokens than the budget,
    unless it is one item alone. The largest items come first, so that memory that does not suffice shows at once.
    """
    order = sorted(range(len(sizes)), key=lambda index: (sum(sizes[index]), sizes[index], -index), reverse=True)
    batches: list[list[int]] = []
    first = second = 0
    for index in order:
        first, second = max(first, sizes[index][0]), max(second, sizes[index][1])
        if batches and (len(batches[-1]) + 1) * (first + second) <= budget:
            batches[-1].append(index)
        else:
            batches.append([index])
            first, second = sizes[index]
    return batches


def split_batches(rows: Sequence[Any], batch_size: int) -> list[list[Any]]:
    """Split rows into batches, in their order; the last one may be smaller."""
    return [list(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]


def limit_tokens(model: PreTrainedModel, budget: int) -> int:
    """Lower a budget of tokens to what a forward pass with logits for half of them may hold."""
    config: Any = model.config.get_text_config()
    return min(budget, 2 * _MOST_LOGITS // config.vocab_size)


def respond(
    model: PreTrainedModel, prompts: list[list[int]], max_new_tokens: int, stop_ids: list[int], pad_id: int
) -> list[list[int]]:
    """Decode the greedy responses to a batch of prompts, up to their stop tokens, by the plain argmax."""
    longest = max(map(len, prompts))
    input_ids = torch.tensor([[pad_id] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    options = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=stop_ids or None, pad_token_id=pad_id
    )
    device = input_device(model)
    generate: Any = model.generate
    with without_generation_defaults(model):
        output = generate(input_ids.to(device), attention_mask=mask.to(device), generation_config=options)
    return [response[: count_until_stop(response, stop_ids)] for response in output[:, longest:].tolist()]


def find_stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end a response: those of the model's generation config, otherwise that of the tokenizer."""
    ids = model.generation_config.eos_token_id
    if ids is None:
        ids = tokenizer.eos_token_id
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else list(ids)


@contextmanager
def without_generation_defaults(model: PreTrainedModel) -> Iterator[None]:
    """Leave out the model's own generation defaults: a fixed point is the plain argmax, without any processor."""
    defaults = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = defaults
