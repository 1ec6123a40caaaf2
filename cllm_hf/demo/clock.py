"""How long each step of the demo takes."""

from __future__ import annotations

import time


class Clock:
    """Time of each step, in seconds, in `laps`."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._start = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = now - self._start
        self._start = now
