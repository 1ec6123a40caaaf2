"""Whether answers are right, how sure a share of right answers is, and how two models differ on the same prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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


def count_right(judgements: Sequence[Judgement]) -> dict[str, Any]:
    """
    Count right answers: their `share` from 0 to 1 with its `interval`, `num_right`, `num_answers`, and how many
    answers there are of each of the `kinds`, the most frequent first.
    """
    if not judgements:
        raise ValueError("There must be at least one answer to judge, got none.")
    num_right, num_answers = sum(judgement.is_right for judgement in judgements), len(judgements)
    return {
        "share": num_right / num_answers,
        "interval": list(wilson_interval(num_right, num_answers)),
        "num_right": num_right,
        "num_answers": num_answers,
        "kinds": dict(Counter(judgement.kind for judgement in judgements).most_common()),
    }


def wilson_interval(num_right: int, num_answers: int) -> tuple[float, float]:
    """Wilson's bounds of a share, from 0 to 1, at a confidence of 95%."""
    bounds = binomtest(num_right, num_answers).proportion_ci(method="wilson")
    return float(bounds.low), float(bounds.high)


def compare_judgements(first: Sequence[Judgement], second: Sequence[Judgement]) -> dict[str, Any]:
    """
    Count which of two models solves which prompts, and test whether the difference may be chance.

    A model's own interval says how sure its accuracy is. Of a difference between two models on the same prompts more
    is known: prompts that both solve, or neither, say nothing about it.
    """
    pairs = Counter((ours.is_right, theirs.is_right) for ours, theirs in zip(first, second))
    only_first, only_second = pairs[True, False], pairs[False, True]
    return {
        "num_both": pairs[True, True],
        "num_only_first": only_first,
        "num_only_second": only_second,
        "num_neither": pairs[False, False],
        "difference": (only_second - only_first) / len(first),
        "p_value": sign_test(only_first, only_second),
    }


def sign_test(num_first: int, num_second: int) -> float:
    """Probability of a split at least as uneven by a fair coin, which is McNemar's test in its exact form."""
    total = num_first + num_second
    return float(binomtest(num_first, total).pvalue) if total else 1.0
