"""
How many positions the next forward checks.

A wider block costs more time and has more tokens accepted; how much of either depends on the device, the model and the
text. `AutoPace` measures both as it decodes and takes the block size with the most tokens a second, down to 1.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from .options import AUTO


_CANDIDATES = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64)
_FIRST = 8
# Iterations at a block size before it is judged: the first after a narrower one has a draft that was never predicted.
_STAY = 4
# Where drafts do not pay, share of the time that may go into finding out whether they do by now.
_PROBING_SHARE = 0.01
_PROBE_SIZE = 4
# Samples that a block size needs to be judged by them, instead of by those of wider blocks.
_ENOUGH = 24


@dataclass
class Experience:
    """
    What was measured with a model, over all calls of `generate`.

    Attributes:
        seconds (`dict[tuple[int, int], deque[float]]`): latest times of an iteration, by rows and block size.
        samples (`deque[tuple[int, int]]`): latest block sizes, and the tokens that a row gained from them.
        total_seconds (`float`): time of all iterations.
        probing_seconds (`float`): the part of it that went into wider blocks than seemed best.
    """

    seconds: dict[tuple[int, int], deque[float]] = field(default_factory=dict)
    samples: deque[tuple[int, int]] = field(default_factory=lambda: deque(maxlen=512))
    total_seconds: float = 0.0
    probing_seconds: float = 0.0

    def cost(self, num_rows: int, block_size: int) -> float:
        """
        Time of an iteration: measured, else on the line between the nearest measured ones.

        Args:
            num_rows (`int`): rows of the batch; times of this number must exist.
            block_size (`int`): positions checked.

        Returns:
            `float`: seconds.
        """
        known = {size: statistics.median(times) for (rows, size), times in self.seconds.items() if rows == num_rows}
        if block_size in known:
            return known[block_size]
        below = max((size for size in known if size < block_size), default=None)
        above = min((size for size in known if size > block_size), default=None)
        if below is not None and above is not None:
            share = (block_size - below) / (above - below)
            return known[below] + share * (known[above] - known[below])
        nearest = below if below is not None else above
        assert nearest is not None
        # Cheaper than it will prove to be, so that it gets tried.
        return known[nearest] * (block_size / nearest) ** 0.5

    def gain(self, block_size: int) -> float:
        """
        Tokens that a row gains in an iteration.

        Args:
            block_size (`int`): positions checked.

        Returns:
            `float`: the mean over what this block size brought, or wider ones cut to it; beyond the widest that was
            tried, as if every further token were as likely to be right.
        """
        own = [count for size, count in self.samples if size == block_size]
        if len(own) >= _ENOUGH:
            return statistics.fmean(own)
        widest = max(size for size, _ in self.samples)
        capped = [min(count, block_size) for size, count in self.samples if size >= min(block_size, widest)]
        gain = statistics.fmean(capped)
        if block_size > widest:
            full = sum(count == widest for count in capped) / len(capped)
            going_on = 1 - 1 / gain  # of a geometric distribution with this mean
            gain += full * sum(going_on**step for step in range(1, block_size - widest + 1))
        return gain


_EXPERIENCES: WeakKeyDictionary[Any, Experience] = WeakKeyDictionary()


class FixedPace:
    """
    The same block size in every forward.

    Args:
        block_size (`int`): positions checked.
    """

    def __init__(self, block_size: int):
        self.max_block_size = block_size

    def block_size(self, num_rows: int) -> int:
        """
        Positions to check in the next forward.

        Args:
            num_rows (`int`): rows that take part.

        Returns:
            `int`: at least 1.
        """
        return self.max_block_size

    def record(self, block_size: int, counts: list[int]) -> None:
        """
        Take note of an iteration.

        Args:
            block_size (`int`): positions that it checked.
            counts (`list[int]`): tokens that each row gained.
        """


class AutoPace(FixedPace):
    """
    The block size with the most tokens a second, as far as is known.

    Args:
        experience (`Experience`): what earlier calls have measured; added to.
        clock (`Callable[[], float]`): seconds.
    """

    def __init__(self, experience: Experience, clock: Callable[[], float] = time.perf_counter):
        super().__init__(_CANDIDATES[-1])
        self._experience = experience
        self._clock = clock
        self._last_time: float | None = None
        self._last_size = 1
        self._current = _FIRST
        self._left_to_stay = _STAY if not experience.samples else 0
        self._probes = False

    def block_size(self, num_rows: int) -> int:
        if self._left_to_stay <= 0:
            self._choose(num_rows)
        return self._current

    def record(self, block_size: int, counts: list[int]) -> None:
        now = self._clock()
        # The first iteration is the prefill, whose time says nothing of the others, and whose draft is a mere guess.
        if self._last_time is not None:
            seconds = now - self._last_time
            times = self._experience.seconds.setdefault((len(counts), block_size), deque(maxlen=9))
            times.append(seconds)
            self._experience.total_seconds += seconds
            if self._probes:
                self._experience.probing_seconds += seconds
            if 1 < self._last_size and 1 < block_size:
                self._experience.samples.extend((block_size, count) for count in counts)
            self._left_to_stay -= 1
        self._last_time = now
        self._last_size = block_size

    def _choose(self, num_rows: int) -> None:
        experience = self._experience
        measured = [size for rows, size in experience.seconds if rows == num_rows]
        if not experience.samples or not measured:
            self._current, self._left_to_stay, self._probes = max(self._current, _PROBE_SIZE), _STAY, False
            return
        widest = max(size for size, _ in experience.samples)
        candidates = [size for size in _CANDIDATES if size <= 2 * widest]
        best = max(candidates, key=lambda size: self._rate(num_rows, size))
        stay, self._probes = _STAY if best > self._current else 1, False
        if best < _PROBE_SIZE:
            allowed = _PROBING_SHARE * experience.total_seconds
            probe_seconds = _STAY * experience.cost(num_rows, _PROBE_SIZE)
            if experience.probing_seconds + probe_seconds <= allowed:
                best, stay, self._probes = _PROBE_SIZE, _STAY, True
        self._current, self._left_to_stay = best, stay

    def _rate(self, num_rows: int, block_size: int) -> float:
        gain = 1.0 if block_size == 1 else self._experience.gain(block_size)
        return gain / self._experience.cost(num_rows, block_size)


def make_pace(model: Any, block_size: int | str) -> FixedPace:
    """
    Make the pace that an option asks for.

    Args:
        model (`transformers.PreTrainedModel`): whose experience is used and extended.
        block_size (`int` or `"auto"`): the option.

    Returns:
        `FixedPace`.
    """
    if block_size == AUTO:
        return AutoPace(_EXPERIENCES.setdefault(model, Experience()))
    return FixedPace(int(block_size))
