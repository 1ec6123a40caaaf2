"""Which of several processes that share a collection this one is."""

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
    """

    index: int = 0
    count: int = 1

    @classmethod
    def current(cls) -> Process:
        """
        This process, by the environment variables `RANK` and `WORLD_SIZE` of `torchrun` and `accelerate launch`.

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
        return cls(int(index), int(count))
