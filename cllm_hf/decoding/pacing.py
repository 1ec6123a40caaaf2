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

from ..options import AUTO


_CANDIDATES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
# Block size to begin with, and iterations at it and then without drafts: the former show the acceptance, the latter
# the time.
_FIRST, _FIRST_STAY = 16, 5
_NARROWEST_STAY = 3
# Widest that is tried where nothing is known any more.
_PROBE = 8
# Iterations until the choice is looked at again: longer and longer while it stays the same.
_STAY, _LONGEST_STAY = 5, 40
# Times of a block size of which the least counts. Later ones change it, and some of the change is taken to be one of
# the machine's speed, which meets all sizes alike.
_FIRST_TIMES = 3
_SHARED_CHANGE, _OWN_CHANGE = 0.1, 0.05
# A sample loses this share of its weight with every iteration, so that what is known follows the text.
_FADING = 0.003
# Weight of samples that say something of a block size.
_ENOUGH = 2.5
# Least that a wider block gains over what is certain of a narrower one.
_CONTRADICTION = 0.6
_CERTAIN = 12.0
# Where drafts hardly pay, noise would have them tried forever: they have to promise this much more than none.
_MARGIN = 1.04
# Weight of the hope that all of a block is accepted: sizes with few samples are tried again.
_OPTIMISM = 0.1


class Gains:
    """
    Tokens that a row gained from blocks of every size.

    What a size is worth is known from its own samples only, since a draft gets better with every iteration that it
    stays in the block. Samples of other sizes give upper bounds: of a wider block, cut to this size; of a narrower
    one, times the square root of the ratio.
    """

    def __init__(self) -> None:
        # By block size, the weight of the samples by the tokens gained, in units of an old sample: instead of the old
        # ones fading, new ones weigh more.
        self._samples: dict[int, dict[int, float]] = {}
        self._unit = 1.0

    def add(self, block_size: int, counts: list[int]) -> None:
        """
        Take note of an iteration.

        Args:
            block_size (`int`): positions that were checked.
            counts (`list[int]`): tokens that each row gained, from 1 to `block_size`.
        """
        self._unit /= 1 - _FADING
        samples = self._samples.setdefault(block_size, {})
        for count in counts:
            samples[count] = samples.get(count, 0.0) + self._unit
        if self._unit > 1e9:
            self._samples = {size: self._current(size) for size in self._samples}
            self._unit = 1.0

    @property
    def is_empty(self) -> bool:
        """`bool`: whether there are no samples yet."""
        return not self._samples

    def hopes(self) -> dict[int, float]:
        """
        What blocks may well gain.

        Returns:
            `dict[int, float]`: by block size, up to twice what is known of: the mean of its samples with an allowance
            for few of them, or the upper bounds from other sizes.
        """
        known: dict[int, dict[int, float]] = {}
        most = 1.0
        for size in sorted(self._samples):
            samples = self._current(size)
            # A wider block does not gain less: samples that say so by far are of another text.
            if sum(samples.values()) >= _ENOUGH and _hopeful_mean(samples, size) >= _CONTRADICTION * most:
                known[size] = samples
                if sum(samples.values()) >= _CERTAIN:
                    most = _hopeful_mean(samples, size)
        widest = max(2 * max(known, default=1), _PROBE)
        return {size: 1.0 if size == 1 else self._hope(size, known) for size in _CANDIDATES if size <= widest}

    def _hope(self, size: int, known: dict[int, dict[int, float]]) -> float:
        bounds = [_hopeful_mean(known[other], size) for other in known if other >= size][:2]
        if not bounds:
            narrower = max(known, default=1)
            reached = _hopeful_mean(known[narrower], size) if known else 1.0
            bounds.append(reached * (size / narrower) ** 0.5)
        return min(bounds)

    def _current(self, block_size: int) -> dict[int, float]:
        """Samples of a size with the weight that they have by now, where a new one has 1."""
        return {count: weight / self._unit for count, weight in list(self._samples[block_size].items())}


def _hopeful_mean(samples: dict[int, float], limit: int) -> float:
    """Mean of weighted counts, each cut to a limit, with a little weight on the limit itself."""
    total = sum(samples.values())
    gained = sum(weight * min(count, limit) for count, weight in samples.items())
    return (gained + _OPTIMISM * limit) / (total + _OPTIMISM)


class Experience:
    """
    What was measured with a model, over all calls of `generate`.

    Attributes:
        gains (`Gains`): of its blocks.
    """

    def __init__(self) -> None:
        self.gains = Gains()
        # Seconds of an iteration, by the number of rows (in powers of two) and by block size.
        self._seconds: dict[int, dict[int, float]] = {}
        self._num_times: dict[tuple[int, int], int] = {}

    def add_time(self, num_rows: int, block_size: int, seconds: float) -> None:
        """
        Take note of the time of an iteration.

        Args:
            num_rows (`int`): rows that took part.
            block_size (`int`): positions checked.
            seconds (`float`): time.
        """
        known = self._seconds.setdefault(num_rows.bit_length(), {})
        self._num_times[num_rows.bit_length(), block_size] = number = (
            self._num_times.get((num_rows.bit_length(), block_size), 0) + 1
        )
        if number <= _FIRST_TIMES:  # the first ones pay for what is set up once
            known[block_size] = min(seconds, known.get(block_size, seconds))
            return
        change = min(max(seconds / known[block_size], 0.5), 2.0)
        for size in list(known):  # other threads may add to it
            known[size] *= change**_SHARED_CHANGE
        known[block_size] *= change**_OWN_CHANGE

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
        times = self._seconds[nearest]
        # No block is slower than a wider one: what says so was measured while the machine did something else.
        known = [(size, min(times[wider] for wider in times if wider >= size)) for size in sorted(times)]

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

    def block_size(self, num_rows: int, limit: int) -> int:
        """
        Positions to check in the next forward.

        Args:
            num_rows (`int`): rows that take part.
            limit (`int`): most that there are, at least 1.

        Returns:
            `int`: 1 to `limit`.
        """
        return min(self.max_block_size, limit)

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
        self._current, self._left_to_stay = _FIRST, _FIRST_STAY
        self._stay = _STAY
        if not experience.gains.is_empty:
            self._left_to_stay = 0

    def block_size(self, num_rows: int, limit: int) -> int:
        if self._left_to_stay <= 0:
            self._choose(num_rows)
        return min(self._current, limit)

    def record(self, block_size: int, counts: list[int]) -> None:
        now = self._clock()
        # The prefill takes a time of its own.
        if self._last_time is not None:
            if block_size == self._current:
                self._experience.add_time(len(counts), block_size, now - self._last_time)
            # Behind a forward without a draft there is nothing to draft from. Blocks that the end of the text cuts
            # count too: otherwise wide ones would be judged by beginnings of texts, narrow ones by ends.
            if self._last_size > 1 or self._current == 1:
                self._experience.gains.add(self._current, counts)
        self._left_to_stay -= 1
        self._last_time = now
        self._last_size = block_size

    def _choose(self, num_rows: int) -> None:
        experience = self._experience
        if experience.gains.is_empty:
            self._current, self._left_to_stay = _FIRST, _FIRST_STAY
        elif not experience.knows(num_rows, 1) and not experience.knows(1, 1):
            self._current, self._left_to_stay = 1, _NARROWEST_STAY
        else:
            cost = experience.costs(num_rows)
            rates = {size: hope / cost(size) for size, hope in experience.gains.hopes().items()}
            rates[1] *= _MARGIN
            best = max(rates, key=lambda size: rates[size])
            self._stay = min(2 * self._stay, _LONGEST_STAY) if best == self._current else _STAY
            self._current, self._left_to_stay = best, self._stay


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
