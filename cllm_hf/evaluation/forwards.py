"""The time of a bare forward pass of the model, which no way to decode can fall below."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache

from .._host import base_model_of


_NUM_WARM_UPS = 3


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


class BareForward:
    """
    A model with a cache of its own, to be timed on `width` tokens with nothing around the forward pass.

    Args:
        model (`transformers.PreTrainedModel` or `peft.PeftModel`): the model.
        width (`int`): tokens a row of a forward pass; they are random.
        batch_size (`int`): rows.
    """

    def __init__(self, model: Any, width: int, batch_size: int = 1):
        self.width = width
        self._forward = base_model_of(model)
        config = model.config.get_text_config()
        generator = torch.Generator().manual_seed(0)
        self._ids = torch.randint(config.vocab_size, (batch_size, width), generator=generator).to(model.device)
        self._cache = DynamicCache(config=config)
        self._cache.activate_past_recording()  # layers that see a window only can then be cut too

    @torch.no_grad()
    def seconds(self, cache_length: int) -> float:
        """
        Time one forward pass. The cache is filled and cut outside the clocks, which are read after a device sync.

        Args:
            cache_length (`int`): tokens in the cache before the forward pass; no fewer than in the call before, since
                layers that see a window cannot go back further.

        Returns:
            `float`: seconds.
        """
        length = self._cache.get_seq_length()
        surplus = length - cache_length
        if length > 0:
            self._cache.crop(-max(surplus, 0))
        if surplus < 0:
            self._forward(self._filler(-surplus), past_key_values=self._cache, use_cache=True)
            self._cache.crop(0)  # lets go of what has left a window
        device = self._ids.device
        synchronize(device)
        start = time.perf_counter()
        self._forward(self._ids, past_key_values=self._cache, use_cache=True)
        synchronize(device)
        return time.perf_counter() - start

    def _filler(self, length: int) -> torch.Tensor:
        return self._ids.repeat(1, -(-length // self.width))[:, :length]


def compare_widths(
    model: Any, widths: Sequence[int], cache_length: int, batch_size: int = 1, iterations: int = 32
) -> dict[int, list[float]]:
    """
    Time forward passes of several widths, one of each in turn; the first few turns are left out.

    Args:
        model (`transformers.PreTrainedModel` or `peft.PeftModel`): the model.
        widths (`Sequence[int]`): tokens a row of a forward pass.
        cache_length (`int`): tokens in the cache before each forward pass.
        batch_size (`int`): rows.
        iterations (`int`): forward passes of each width.

    Returns:
        `dict[int, list[float]]`: for each width the seconds of each forward pass.
    """
    forwards = [BareForward(model, width, batch_size) for width in sorted(set(widths))]
    seconds: dict[int, list[float]] = {forward.width: [] for forward in forwards}
    for _ in range(_NUM_WARM_UPS + iterations):
        for forward in forwards:
            seconds[forward.width].append(forward.seconds(cache_length))
    return {width: values[_NUM_WARM_UPS:] for width, values in seconds.items()}


def relative_cost(seconds: dict[int, list[float]], width: float) -> float:
    """
    Cost of a forward pass of some width in forward passes of one token: the median of the ratios to a neighbor.

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
