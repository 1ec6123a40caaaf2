"""Which of several processes that share a work this one is: the one place that reads what launchers say of it."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Process:
    """
    Which of several processes this one is.

    Attributes:
        index (`int`): from 0.
        count (`int`): how many there are.
        local_index (`int`): which of those on this machine, from 0; its GPU has that number.
    """

    index: int = 0
    count: int = 1
    local_index: int = 0

    @classmethod
    def current(cls) -> Process:
        """
        This process, by the environment variables `RANK`, `WORLD_SIZE` and `LOCAL_RANK` of `torchrun` and
        `accelerate launch`.

        Returns:
            `Process`.

        Raises:
            ValueError: if they are not numbers that fit each other.
        """
        index, count = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
            raise ValueError(
                "The environment variables `RANK` and `WORLD_SIZE` must be numbers, `RANK` below `WORLD_SIZE`, got "
                f"{index!r} and {count!r}. Unset both to run in one process."
            )
        local_index = os.environ.get("LOCAL_RANK", "0")
        if not local_index.removeprefix("-").isdecimal():
            raise ValueError(
                f"The environment variable `LOCAL_RANK` must be a number, got {local_index!r}. Unset it to use the "
                "first GPU."
            )
        return cls(int(index), int(count), max(int(local_index), 0))  # some launchers say -1 for a single process

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes and talks."""
        return self.index == 0
