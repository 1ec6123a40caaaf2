"""How far an evaluation is, and about how long it still takes: a bar in a terminal, otherwise lines."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm.auto import tqdm


Say = Callable[[str], None]
_SECONDS_A_LINE = 10.0
_SHARE_TO_JUDGE_BY = 0.1  # done before an estimate: of units that run side by side the first ones take longest


class Progress:
    """
    Tells of the stages of an evaluation, one after the other.

    `show_bar` draws a bar for each. Otherwise `say` gets lines: one when a stage begins, one when it ends, and between
    them one every ten seconds at most. Results go to `say` in any case. It may be left out.
    """

    def __init__(self, show_bar: bool = False, say: Say | None = None):
        self._show_bar = show_bar
        self.say: Say = say or (lambda line: None)
        self._say_stage: Say = (lambda line: None) if show_bar else self.say

    @contextmanager
    def stage(self, what: str, total: int, unit: str = "prompts", expected: float | None = None) -> Iterator[Stage]:
        """Count `total` units of work, within a `with` statement; `expected` is about how many seconds they take."""
        with tqdm(total=total, desc=what, unit=f" {unit}", disable=not self._show_bar or not total) as bar:
            stage = Stage(what, total, unit, self._say_stage, bar)
            if total:
                about = "" if expected is None else f", about {format_seconds(expected)}"
                self._say_stage(f"{what}: {total:,} {unit}{about}")
            yield stage
            stage.end()


class Stage:
    """A stage of a `Progress`."""

    def __init__(self, what: str, total: int, unit: str, say: Say, bar: Any):
        self._what, self._total, self._unit, self._say, self._bar = what, total, unit, say, bar
        self._num_done = self._num_kept = 0
        self._start = self._said = time.monotonic()

    def advance(self, count: int = 1, is_kept: bool = False) -> None:
        """Count units as done; those that an earlier run has left say nothing of how long the others take."""
        self._num_done += count
        self._num_kept += count * is_kept
        self._bar.update(count)
        now = time.monotonic()
        if now - self._said >= _SECONDS_A_LINE and self._num_done < self._total:
            self._said = now
            left = self._seconds_left(now)
            about = "" if left is None else f", about {format_seconds(left)} left"
            self._say(f"{self._what}: {self._num_done:,} of {self._total:,} {self._unit}{about}")

    def end(self) -> None:
        """Say how long it has taken."""
        if self._num_kept:
            self._say(f"{self._what}: {self._num_kept:,} of {self._total:,} {self._unit} are of an earlier run")
        if self._total:
            self._say(f"{self._what}: done in {format_seconds(time.monotonic() - self._start)}")

    def _seconds_left(self, now: float) -> float | None:
        num_timed = self._num_done - self._num_kept
        if num_timed < _SHARE_TO_JUDGE_BY * (self._total - self._num_kept):
            return None
        return (now - self._start) / num_timed * (self._total - self._num_done)


def format_seconds(seconds: float) -> str:
    """As a person says it: 48 s, 12 min, 3 h 20 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
