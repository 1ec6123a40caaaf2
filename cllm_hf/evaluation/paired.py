"""Two models on the same prompts: which prompts only one of them solves, and whether that may be chance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .judgements import Judgement


@dataclass(frozen=True)
class PairedComparison:
    """
    Right answers of two models to the same prompts.

    A model's own interval says how sure its accuracy is. Of a difference between two models on the same prompts more
    is known: prompts that both solve, or neither, say nothing about it.

    Attributes:
        num_both (`int`): prompts that both solve.
        num_only_first (`int`): prompts that the first solves alone.
        num_only_second (`int`): prompts that the second solves alone.
        num_neither (`int`): prompts that neither solves.
    """

    num_both: int
    num_only_first: int
    num_only_second: int
    num_neither: int

    @property
    def difference(self) -> float:
        """`float`: share of right answers of the second less that of the first, from -1 to 1."""
        total = self.num_both + self.num_only_first + self.num_only_second + self.num_neither
        return (self.num_only_second - self.num_only_first) / total

    @property
    def p_value(self) -> float:
        """`float`: of the exact two-sided sign test; see `sign_test`."""
        return sign_test(self.num_only_first, self.num_only_second)


def compare_judgements(first: Sequence[Judgement], second: Sequence[Judgement]) -> PairedComparison:
    """
    Count which of two models solves which prompts.

    Args:
        first (`Sequence[Judgement]`): of the first model's answer to each prompt.
        second (`Sequence[Judgement]`): of the second model's, in the same order.

    Returns:
        `PairedComparison`.

    Raises:
        ValueError: if there are none, or the numbers differ.
    """
    if not first or len(first) != len(second):
        raise ValueError(
            f"Both models must answer the same prompts, at least one, got {len(first)} and {len(second)} answers."
        )
    pairs = [(ours.is_right, theirs.is_right) for ours, theirs in zip(first, second)]
    outcomes = ((True, True), (True, False), (False, True), (False, False))
    return PairedComparison(*(pairs.count(outcome) for outcome in outcomes))


def sign_test(num_first: int, num_second: int) -> float:
    """
    How often a fair coin would split a number of prompts at least as unevenly: the exact two-sided sign test.

    With the prompts that exactly one of two models solves it is McNemar's test in its exact form: if both models were
    equally good, each such prompt would fall to either with the same probability.

    Args:
        num_first (`int`): prompts that fell to the first.
        num_second (`int`): prompts that fell to the second.

    Returns:
        `float`: p-value, above 0 and at most 1; 1 without prompts.

    Raises:
        ValueError: for negative numbers.
    """
    if min(num_first, num_second) < 0:
        raise ValueError(f"Numbers of prompts must be at least 0, got {num_first} and {num_second}.")
    total, fewer = num_first + num_second, min(num_first, num_second)
    tail = sum(math.comb(total, count) for count in range(fewer + 1))
    return min(2 * tail / 2**total, 1.0)
