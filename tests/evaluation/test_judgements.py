"""Shares of right answers and their intervals."""

import itertools
import math

import pytest

from cllm_hf.evaluation.judgements import Judgement, count_right, sign_test, wilson_interval


def test_answers_are_counted_by_kind():
    judgements = [Judgement(True, "right"), Judgement(False, "error"), Judgement(False, "error")]
    counted = count_right(judgements)
    assert (counted["num_right"], counted["num_answers"], counted["share"]) == (1, 3, 1 / 3)
    assert counted["interval"] == list(wilson_interval(1, 3))
    assert list(counted["kinds"].items()) == [("error", 2), ("right", 1)]
    with pytest.raises(ValueError, match="at least one answer"):
        count_right([])


@pytest.mark.parametrize("num_answers", [1, 7, 200, 1034])
def test_bounds_are_where_the_sample_would_be_just_as_unlikely(num_answers):
    """The share p at each bound is z standard deviations, as they are at p, from the sample's share."""
    for num_right in {0, 1, num_answers // 3, num_answers}:
        share = num_right / num_answers
        for bound in wilson_interval(num_right, num_answers):
            distance = 1.959964 * math.sqrt(bound * (1 - bound) / num_answers)
            assert abs(abs(share - bound) - distance) < 1e-7
        low, high = wilson_interval(num_right, num_answers)
        assert 0 <= low < high <= 1 and low - 1e-12 <= share <= high + 1e-12


def test_the_sign_test_is_that_of_all_sequences_of_coins():
    for total in range(9):
        splits = [sum(coins) for coins in itertools.product((0, 1), repeat=total)]
        for heads in range(total + 1):
            as_uneven = sum(abs(2 * split - total) >= abs(2 * heads - total) for split in splits)
            assert sign_test(heads, total - heads) == pytest.approx(as_uneven / len(splits))
