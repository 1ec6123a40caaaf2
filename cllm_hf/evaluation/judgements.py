"""Whether an answer is right, and how sure a share of right answers is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import binomtest


@dataclass(frozen=True)
class Judgement:
    """
    What a metric says of one answer.

    Attributes:
        is_right (`bool`): whether it is right.
        kind (`str`): why, in a word or two that are the same for all such answers, such as `"no answer"`; what is
            counted by.
    """

    is_right: bool
    kind: str


@dataclass(frozen=True)
class Accuracy:
    """
    A share of right answers.

    Attributes:
        num_right (`int`): answers that are right.
        num_answers (`int`): all answers, at least one.
        kinds (`dict[str, int]`): how many answers there are of each kind, the most frequent first.
    """

    num_right: int
    num_answers: int
    kinds: dict[str, int]

    @property
    def share(self) -> float:
        """`float`: from 0 to 1."""
        return self.num_right / self.num_answers

    @property
    def interval(self) -> tuple[float, float]:
        """`tuple[float, float]`: Wilson's bounds of the share, from 0 to 1, at a confidence of 95%."""
        bounds = binomtest(self.num_right, self.num_answers).proportion_ci(method="wilson")
        return float(bounds.low), float(bounds.high)


def count_right(judgements: Sequence[Judgement]) -> Accuracy:
    """
    Count what is right.

    Args:
        judgements (`Sequence[Judgement]`): of each answer.

    Returns:
        `Accuracy`.

    Raises:
        ValueError: if there are none.
    """
    if not judgements:
        raise ValueError("There must be at least one answer to judge, got none.")
    kinds = Counter(judgement.kind for judgement in judgements)
    return Accuracy(sum(judgement.is_right for judgement in judgements), len(judgements), dict(kinds.most_common()))
