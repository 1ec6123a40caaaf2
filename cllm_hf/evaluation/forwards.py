"""The time of a bare forward of the model, which no way to decode can fall below."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache

from .._host import base_model_of


def synchronize(device: torch.device) -> None:
    """
    Wait until a device has done all its work; a CPU always has.

    Args:
        device (`torch.device`): the device.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type != "cpu":
        torch.accelerator.synchronize(device)


@torch.no_grad()
def time_forwards(model: Any, cache_lengths: Sequence[int], width: int, batch_size: int = 1) -> list[float]:
    """
    Time the model on `width` tokens behind caches of given lengths, with nothing around it.

    Tokens are random; the cache is filled and cut outside the clocks, which are read after a device sync.

    Args:
        model (`transformers.PreTrainedModel` or `peft.PeftModel`): the model.
        cache_lengths (`Sequence[int]`): tokens in the cache before each forward, each at least 1 and at most `width`
            more than the one before.
        width (`int`): tokens a row of a forward.
        batch_size (`int`): rows.

    Returns:
        `list[float]`: seconds of each forward.

    Raises:
        ValueError: if a cache length cannot follow from the one before.
    """
    forward = base_model_of(model)
    device = model.device
    vocab_size = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    longest = max(cache_lengths)
    ids = torch.randint(vocab_size, (batch_size, longest + width), generator=generator).to(device)
    cache = DynamicCache(config=model.config.get_text_config())
    cache.activate_past_recording()  # layers that see a window only can then be cut too
    forward(ids[:, : cache_lengths[0]], past_key_values=cache, use_cache=True)
    seconds = []
    for length in cache_lengths:
        surplus = cache.get_seq_length() - length
        if surplus < 0:
            raise ValueError(f"`cache_lengths` may grow by at most `width`, {width}, got {list(cache_lengths)}.")
        cache.crop(-surplus)
        block = ids[:, length : length + width]
        synchronize(device)
        start = time.perf_counter()
        forward(block, past_key_values=cache, use_cache=True)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return seconds


def compare_widths(
    model: Any, widths: Sequence[int], cache_length: int, batch_size: int = 1, iterations: int = 8, rounds: int = 5
) -> dict[int, list[float]]:
    """
    Time forwards of several widths in turns, after one round that is left out.

    Args:
        model (`transformers.PreTrainedModel` or `peft.PeftModel`): the model.
        widths (`Sequence[int]`): tokens a row of a forward.
        cache_length (`int`): tokens in the cache before each forward.
        batch_size (`int`): rows.
        iterations (`int`): forwards of a round.
        rounds (`int`): how often each width has its turn.

    Returns:
        `dict[int, list[float]]`: for each width the median seconds of each round.
    """
    lengths = [cache_length] * iterations
    medians: dict[int, list[float]] = {width: [] for width in sorted(set(widths))}
    for _ in range(rounds + 1):
        for width, values in medians.items():
            values.append(statistics.median(time_forwards(model, lengths, width, batch_size)))
    return {width: values[1:] for width, values in medians.items()}


def relative_cost(seconds: dict[int, list[float]], width: float) -> float:
    """
    Cost of a forward of some width in forwards of one token: the median over the rounds of the ratio in each.

    Args:
        seconds (`dict[int, list[float]]`): result of `compare_widths`, with width 1.
        width (`float`): the width; between two measured widths the cost is interpolated linearly.

    Returns:
        `float`.
    """
    costs = {
        measured: statistics.median(value / one for value, one in zip(values, seconds[1]))
        for measured, values in seconds.items()
    }
    if width in costs:
        return costs[int(width)]
    below = max((measured for measured in costs if measured < width), default=min(costs))
    above = min((measured for measured in costs if measured > width), default=max(costs))
    if below == above:
        return costs[below]
    share = (width - below) / (above - below)
    return costs[below] + share * (costs[above] - costs[below])
