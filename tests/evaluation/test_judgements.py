"""Shares of right answers and their intervals."""

import math

import pytest

from cllm_hf.evaluation.judgements import Accuracy, Judgement, count_right


def test_answers_are_counted_by_kind():
    judgements = [Judgement(True, "right"), Judgement(False, "error"), Judgement(False, "error")]
    accuracy = count_right(judgements)
    assert (accuracy.num_right, accuracy.num_answers, accuracy.share) == (1, 3, 1 / 3)
    assert list(accuracy.kinds.items()) == [("error", 2), ("right", 1)]
    with pytest.raises(ValueError, match="at least one answer"):
        count_right([])


@pytest.mark.parametrize("num_answers", [1, 7, 200, 1034])
def test_bounds_are_where_the_sample_would_be_just_as_unlikely(num_answers):
    """The share p at each bound is z standard deviations, as they are at p, from the sample's share."""
    for num_right in {0, 1, num_answers // 3, num_answers}:
        share = num_right / num_answers
        for bound in Accuracy(num_right, num_answers, {}).interval:
            distance = 1.959964 * math.sqrt(bound * (1 - bound) / num_answers)
            assert abs(abs(share - bound) - distance) < 1e-7
        low, high = Accuracy(num_right, num_answers, {}).interval
        assert 0 <= low < high <= 1 and low - 1e-12 <= share <= high + 1e-12
