"""
How many positions the next forward checks.

A wider block costs more time and has more tokens accepted; how much of either depends on the device, the model and the
text. `AutoPace` measures both as it decodes and takes the block size with the most tokens a second, down to 1.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from .options import AUTO


_CANDIDATES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
_WIDEST = _CANDIDATES[-1]
# Block sizes to begin with, and iterations at each: the first is for the acceptance, the second for the time.
_FIRST, _FIRST_STAY = 8, 5
_NARROWEST_STAY = 3
# Iterations until the choice is looked at again.
_STAY = 6
# Where drafts do not pay, share of the time that may go into finding out whether they do by now.
_PROBING_SHARE = 0.015
_PROBE_SIZE, _PROBE_STAY = 4, 4
# Samples after which old ones count half.
_MEMORY = 256


class Acceptance:
    """
    How likely a token of the draft is right where all before it are.

    A sample tells of the positions up to the first wrong one, and of no more than its block has; those beyond the
    widest block that was tried are taken to be like the ones before.
    """

    def __init__(self) -> None:
        # One entry a position of the block, the anchor's successor first.
        self._checked = [0.0] * _WIDEST
        self._right = [0.0] * _WIDEST

    @property
    def widest(self) -> int:
        """`int`: positions that samples tell of."""
        return sum(count >= 1 for count in self._checked) + 1

    def add(self, block_size: int, count: int) -> None:
        """
        Take note of a sample.

        Args:
            block_size (`int`): positions that were checked.
            count (`int`): tokens that were gained, at least 1 and at most `block_size`.
        """
        for position in range(min(count, block_size - 1)):
            self._checked[position] += 1
            self._right[position] += position < count - 1
        if self._checked[0] > _MEMORY:
            self._checked = [value / 2 for value in self._checked]
            self._right = [value / 2 for value in self._right]

    def gains(self) -> list[float]:
        """
        Tokens that blocks of every size are expected to gain.

        Returns:
            `list[float]`: entry `n` belongs to block size `n + 1`.
        """
        overall = (sum(self._right) + 0.5) / (sum(self._checked) + 1)
        gains, reaching = [1.0], 1.0
        for checked, right in zip(self._checked, self._right):
            # A few samples of a far position weigh little against what is known of the others.
            reaching *= (right + 4 * overall) / (checked + 4)
            gains.append(gains[-1] + reaching)
        return gains[:_WIDEST]


class Experience:
    """
    What was measured with a model, over all calls of `generate`.

    Attributes:
        acceptance (`Acceptance`): of its drafts.
        total_seconds (`float`): time of all iterations.
        probing_seconds (`float`): the part of it that went into wider blocks than seemed best.
    """

    def __init__(self) -> None:
        self.acceptance = Acceptance()
        self.total_seconds = 0.0
        self.probing_seconds = 0.0
        # Seconds of an iteration, by the number of rows (in powers of two) and by block size.
        self._seconds: dict[int, dict[int, float]] = {}

    def add_time(self, num_rows: int, block_size: int, seconds: float) -> None:
        """
        Take note of the time of an iteration.

        Args:
            num_rows (`int`): rows that took part.
            block_size (`int`): positions checked.
            seconds (`float`): time.
        """
        known = self._seconds.setdefault(num_rows.bit_length(), {})
        before = known.get(block_size)
        if before is None or seconds < before:
            known[block_size] = seconds
        else:  # whatever else the machine does makes an iteration slower, never faster
            known[block_size] = before + 0.1 * min(seconds - before, before)

    def knows(self, num_rows: int, block_size: int) -> bool:
        """
        Whether this time was measured.

        Args:
            num_rows (`int`): rows that take part.
            block_size (`int`): positions checked.

        Returns:
            `bool`.
        """
        return block_size in self._seconds.get(num_rows.bit_length(), ())

    def costs(self, num_rows: int) -> Callable[[int], float]:
        """
        Time of an iteration by block size, in units that are the same for all block sizes.

        Args:
            num_rows (`int`): rows that take part.

        Returns:
            `Callable[[int], float]`: on the line through the nearest measured times. Needs a measured time.
        """
        nearest = min(self._seconds, key=lambda rows: (abs(rows - num_rows.bit_length()), -len(self._seconds[rows])))
        known = sorted(self._seconds[nearest].items())

        def cost(block_size: int) -> float:
            if len(known) == 1:
                size, seconds = known[0]
                return seconds * (block_size / size) ** 0.5
            above = next((index for index, (size, _) in enumerate(known) if size >= block_size), len(known) - 1)
            (low, low_seconds), (high, high_seconds) = known[max(above - 1, 0)], known[max(above, 1)]
            slope = max((high_seconds - low_seconds) / (high - low), 0.0)
            return low_seconds + slope * (block_size - low)

        return cost


_EXPERIENCES: WeakKeyDictionary[Any, Experience] = WeakKeyDictionary()


class FixedPace:
    """
    The same block size in every forward.

    Args:
        block_size (`int`): positions checked.

    Attributes:
        max_block_size (`int`): most positions that are ever checked.
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
        super().__init__(_WIDEST)
        self._experience = experience
        self._clock = clock
        self._last_time: float | None = None
        self._last_size = 1
        self._current, self._left_to_stay = _FIRST, _FIRST_STAY
        if experience.acceptance.widest > 1:
            self._left_to_stay = 0
        self._is_probing = False

    def block_size(self, num_rows: int) -> int:
        if self._left_to_stay <= 0:
            self._choose(num_rows)
        return self._current

    def record(self, block_size: int, counts: list[int]) -> None:
        now = self._clock()
        # The prefill takes a time of its own, and the end of a text is cut.
        if self._last_time is not None and block_size == self._current:
            seconds = now - self._last_time
            self._experience.add_time(len(counts), block_size, seconds)
            self._experience.total_seconds += seconds
            if self._is_probing:
                self._experience.probing_seconds += seconds
            # Behind a forward without a draft there is nothing to draft from.
            if self._last_size > 1 and block_size > 1:
                for count in counts:
                    self._experience.acceptance.add(block_size, count)
        self._left_to_stay -= 1
        self._last_time = now
        self._last_size = block_size

    def _choose(self, num_rows: int) -> None:
        experience = self._experience
        self._is_probing = False
        if experience.acceptance.widest == 1:
            self._current, self._left_to_stay = _FIRST, _FIRST_STAY
            return
        if not experience.knows(num_rows, 1) and not experience.knows(1, 1):
            self._current, self._left_to_stay = 1, _NARROWEST_STAY
            return
        gains, cost = experience.acceptance.gains(), experience.costs(num_rows)
        best = max(
            (size for size in _CANDIDATES if size <= 2 * experience.acceptance.widest),
            key=lambda size: gains[size - 1] / cost(size),
        )
        self._current, self._left_to_stay = best, _STAY
        if best == 1:
            seconds = experience.probing_seconds + _PROBE_STAY * cost(_PROBE_SIZE)
            if seconds <= _PROBING_SHARE * experience.total_seconds:
                self._current, self._left_to_stay, self._is_probing = _PROBE_SIZE, _PROBE_STAY, True


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
