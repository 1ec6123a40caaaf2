"""How many positions the next forward pass checks: a number, or `"auto"`, which measures what pays as it decodes."""

from __future__ import annotations

import time
from collections.abc import Hashable
from typing import Any

import numpy as np

from ..options import AUTO, DEFAULT_BLOCK_SIZE


_ATTRIBUTE = "_cllm_hf_measurements"
_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
# Iterations at the first size, without drafts, and until a choice is looked at again: twice as many while it stays.
_FIRST_STAY, _NARROWEST_STAY, _STAY, _LONGEST_STAY = 4, 3, 12, 48


class Measurements:
    """What was measured with a model. Its copies and pickles are an empty `dict`, with which measuring starts anew."""

    def __init__(self) -> None:
        # By block size: weight of its samples, and tokens that they gained when cut to each block size.
        self.weights, self.gained = np.zeros(len(_SIZES)), np.zeros((len(_SIZES), len(_SIZES)))
        # Seconds of an iteration and how often they were taken, by number of rows (in powers of two) and block size.
        self.seconds: dict[int, dict[int, float]] = {}
        self._num_times: dict[tuple[int, int], int] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, ()

    def add_counts(self, block_size: int, counts: list[int]) -> None:
        for samples in (self.weights, self.gained):
            samples *= 0.997  # what is known follows the text
        index = _SIZES.index(block_size)
        self.weights[index] += len(counts)
        self.gained[index] += np.minimum(np.array(counts)[:, None], _SIZES).sum(0)

    def gains(self) -> dict[int, float]:
        """Tokens that blocks may gain, up to twice the widest known, with a little hope where samples are few."""
        means = (self.gained + 0.1 * np.array(_SIZES)) / (self.weights[:, None] + 0.1)
        means[0], known, most = 1.0, [0], 1.0
        for index in map(int, np.flatnonzero(self.weights[1:] >= 2.5) + 1):
            if means[index, index] >= 0.6 * most:  # samples of a wider block that gained far less are of another text
                known.append(index)
                most = means[index, index] if self.weights[index] >= 12 else most
        # Upper bounds: of wider blocks, cut to this size; of the widest, as a power of the size, at most its root.
        widest, gain = _SIZES[known[-1]], means[known[-1], known[-1]]
        reached = gain * (np.array(_SIZES) / widest) ** min(np.log(gain) / np.log(widest) if widest > 1 else 0.5, 0.5)
        bounds = [[means[other, i] for other in known if other >= i][:2] or [most] for i, most in enumerate(reached)]
        return {size: float(min(one)) for size, one in zip(_SIZES, bounds) if size <= max(2 * widest, 8)}

    def add_time(self, num_rows: int, block_size: int, seconds: float) -> None:
        times, key = self.seconds.setdefault(num_rows.bit_length(), {}), (num_rows.bit_length(), block_size)
        number = self._num_times[key] = self._num_times.get(key, 0) + 1
        if number <= 3:  # the first ones pay for what is set up once
            times[block_size] = min(seconds, times.get(block_size, seconds))
            return
        change = min(max(seconds / times[block_size], 0.5), 2.0)
        for size in list(times):  # some of a change is one of the machine's speed, which meets all sizes alike
            times[size] *= change**0.15 if size == block_size else change**0.1

    def cost(self, num_rows: int, block_size: int) -> float:
        """Seconds of an iteration, on the line through the nearest measured ones."""
        rows = min(list(self.seconds), key=lambda rows: (abs(rows - num_rows.bit_length()), -len(self.seconds[rows])))
        times = dict(self.seconds[rows])
        # No block is slower than a wider one: what says so was measured while the machine did something else.
        known = [(size, min(times[wider] for wider in times if wider >= size)) for size in sorted(times)]
        if len(known) == 1:
            return known[0][1] * (block_size / known[0][0]) ** 0.5
        above = next((index for index, (size, _) in enumerate(known) if size >= block_size), len(known) - 1)
        (low, low_seconds), (high, high_seconds) = known[max(above, 1) - 1], known[max(above, 1)]
        return low_seconds + max((high_seconds - low_seconds) / (high - low), 0.0) * (block_size - low)


class Pace:
    """The block size of each forward pass of a call: `size`, or with measurements the one that promises most."""

    def __init__(self, size: int, measurements: Measurements | None = None, largest: int | None = None):
        self.max_block_size = size if measurements is None else _SIZES[-1]
        if largest is not None:
            self.max_block_size = min(self.max_block_size, largest)
            sizes = _SIZES if measurements else [self.max_block_size]
            size = max(one for one in sizes if one <= min(size, self.max_block_size))
        self._size, self._measured, self._has_grown = size, measurements, False
        self._last_time, self._last_size = 0.0, 0
        self._stay, self._left = _STAY, 0 if measurements and measurements.weights.any() else _FIRST_STAY

    def block_size(self, num_rows: int, limit: int) -> int:
        """Positions to check in the next forward pass over `num_rows` rows, from 1 to `limit`."""
        if self._measured is not None and self._left <= 0 and self._measured.weights.any():
            self._choose(self._measured, num_rows)
        return min(self._size, limit)

    def record(self, block_size: int, counts: list[int]) -> None:
        """Take note of a forward pass: the positions that it checked, and the tokens that each row gained."""
        now, measured = time.perf_counter(), self._measured
        if measured is not None and self._last_size:  # the prefill takes a time of its own
            if block_size == self._size:
                measured.add_time(len(counts), block_size, now - self._last_time)
            has_grown, self._has_grown = self._has_grown, block_size > self._last_size
            if not has_grown and not self._has_grown:  # a draft that has just grown is worse than it will be
                measured.add_counts(self._size, counts)
        self._left, self._last_time, self._last_size = self._left - 1, now, block_size

    def _choose(self, measured: Measurements, num_rows: int) -> None:
        if not any(1 in measured.seconds.get(rows, ()) for rows in (num_rows.bit_length(), 1)):
            self._size, self._left = 1, _NARROWEST_STAY  # what drafts cost is known by what none costs
            return
        gains = {size: gain for size, gain in measured.gains().items() if size <= self.max_block_size}
        rates = {size: gain / measured.cost(num_rows, size) for size, gain in gains.items()}
        rates[1] *= 1.04  # where drafts hardly pay, noise would have them tried forever
        best = max(rates, key=lambda size: rates[size])
        self._stay = min(2 * self._stay, _LONGEST_STAY) if best == self._size else _STAY
        self._size, self._left = best, self._stay


def make_pace(model: Any, block_size: int | str, strategy: Hashable = None, largest: int | None = None) -> Pace:
    """
    What an option of `generate` asks for, up to the largest size that a strategy can do; `"auto"` uses and extends
    what was measured of a model and a strategy.
    """
    if block_size != AUTO:
        return Pace(int(block_size), largest=largest)
    known = vars(model).setdefault(_ATTRIBUTE, {})
    known[strategy] = known.get(strategy) or Measurements()  # that of a copy is empty
    return Pace(DEFAULT_BLOCK_SIZE, known[strategy], largest)
