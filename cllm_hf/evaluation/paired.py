"""Two models on the same prompts: which prompts only one of them solves, and whether that may be chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import binomtest

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
        """
        `float`: of the exact two-sided sign test on the prompts that exactly one of the models solves, which is
        McNemar's test in its exact form; 1 without such prompts.
        """
        num_one = self.num_only_first + self.num_only_second
        return float(binomtest(self.num_only_first, num_one).pvalue) if num_one else 1.0


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
