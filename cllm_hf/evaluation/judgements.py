"""Whether an answer is right, and how sure a share of right answers is."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


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
        """`tuple[float, float]`: bounds of the share, from 0 to 1, at a confidence of 95%; see `wilson_interval`."""
        return wilson_interval(self.num_right, self.num_answers)


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


def wilson_interval(num_right: int, num_answers: int, z: float = 1.959964) -> tuple[float, float]:
    """
    Bounds of the share that is right in truth, given a sample: Wilson's score interval.

    Unlike the textbook's `p ± z sqrt(p (1 - p) / n)` it stays within 0 and 1, and has a width where all or none of
    the sample is right.

    Args:
        num_right (`int`): right ones in the sample.
        num_answers (`int`): size of the sample, at least 1.
        z (`float`): standard deviations of a normal distribution; 1.96 is a confidence of 95%.

    Returns:
        `tuple[float, float]`: lower and upper bound.

    Raises:
        ValueError: if the numbers are not those of a sample.
    """
    if not 0 <= num_right <= num_answers or num_answers < 1:
        raise ValueError(
            f"`num_right` must be between 0 and `num_answers`, which must be at least 1, got {num_right} of "
            f"{num_answers}."
        )
    share, square = num_right / num_answers, z**2 / num_answers
    middle = (share + square / 2) / (1 + square)
    half = z * math.sqrt(share * (1 - share) / num_answers + square / (4 * num_answers)) / (1 + square)
    return max(middle - half, 0.0), min(middle + half, 1.0)
