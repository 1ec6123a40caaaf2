"""The trajectory of one block of a record, as it is looked at: without padding, and with what was counted on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .statistics import TrajectoryStatistics, measure_trajectories


@dataclass(frozen=True)
class BlockTrajectory:
    """
    The states of a block, from the first draft to the fixed point.

    Attributes:
        states (`list[list[int]]`): each as long as the block is in its response; padding after that is left out.
        number (`int`): of the block in its response, from 0.
        start (`int`): place of its first token in the response, from 0.
        is_trajectory (`bool`): `False` for the single state of a block in which the response is not greedy: those are
            the response's own tokens.
        name (`str`): what it is called in a picture, such as the name of the model.
    """

    states: list[list[int]]
    number: int = 0
    start: int = 0
    is_trajectory: bool = True
    name: str = ""

    @classmethod
    def of(cls, record: Mapping[str, Any], number: int, name: str = "") -> BlockTrajectory:
        """
        Take a block out of a record.

        Args:
            record (`Mapping[str, Any]`): with the columns of `cllm_hf.FEATURES`; without `is_greedy` it is taken as
                true.
            number (`int`): of the block, from 0.
            name (`str`): what to call it.

        Returns:
            `BlockTrajectory`.
        """
        states = record["states"][number]
        start = number * len(states[0])
        length = min(len(states[0]), len(record["response_ids"]) - start)
        is_trajectory = record.get("is_greedy") is not False or len(states) > 1
        return cls([list(state[:length]) for state in states], number, start, is_trajectory, name)

    @property
    def span(self) -> str:
        """`str`: which tokens of the response it holds, counted from 0, such as `"tokens 16 to 31"`."""
        last = self.start + len(self.states[-1]) - 1
        return f"tokens {self.start} to {last}" if last > self.start else f"token {self.start}"

    @property
    def num_iterations(self) -> int:
        """Iterations to converge, the confirming one not counted."""
        return len(self.states) - 1

    @property
    def statistics(self) -> TrajectoryStatistics:
        """What `measure_trajectories` counts on it."""
        return measure_trajectories([{"response_ids": self.states[-1], "states": [self.states]}])

    @property
    def wrong(self) -> list[list[bool]]:
        """Of each token of each state, whether it is another one than at the fixed point."""
        return [[token != right for token, right in zip(state, self.states[-1])] for state in self.states]

    def describe(self) -> str:
        """
        Say how it converges.

        Returns:
            `str`: such as `"3 iterations to converge, 9 fast-forwarded, 4 stationary"`.

        Raises:
            ValueError: for a block without tokens in its response.
        """
        if not self.is_trajectory:
            return "its own tokens, where it is not greedy"
        figures = self.statistics
        noun = "iteration" if self.num_iterations == 1 else "iterations"
        return (
            f"{self.num_iterations} {noun} to converge, {figures.mean_fast_forwarded:.0f} fast-forwarded, "
            f"{figures.mean_stationary:.0f} stationary"
        )
