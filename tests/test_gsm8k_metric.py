"""GSM8K: which number is the answer."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cllm_hf
from cllm_hf.evaluation.metrics.gsm8k import judge_gsm8k, read_answer, read_marked_answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("#### 18", 18),
        ("a 5\n#### 18\nb 6", 18),
        ("####18", 18),
        ("#### -5", -5),
        ("#### −5", -5),
        ("#### $1,234.50", Fraction("1234.5")),
        ("#### -$3", -3),
        ("#### $-3", -3),
        ("#### +3", 3),
        ("#### £ 7", 7),
        ("#### 50%", 50),
        ("#### 3/4", Fraction(3, 4)),
        ("#### 1 1/2", Fraction(3, 2)),
        ("#### 3/0", None),
        ("#### 12.", 12),
        ("#### 1,000,000 people", 1_000_000),
        ("#### 18\n\nQuestion: ...\n#### 7", 18),
        ("#### none\n#### 7", 7),
        ("#### \n7", 7),
        ("####", None),
        ("It is 12.", 12),
        ("It is 12, no, 13.", 13),
        ("16 - 3 = 13", 13),
        ("16-3", 3),
        ("costs $.50", Fraction(1, 2)),
        ("5 <<2+3=5>> eggs", 5),
        ("eggs <<2+3=5>>", None),
        ("1,23", 23),
        ("12,345,67", 67),
        ("\\boxed{18}", 18),
        ("\\$18", 18),
        ("It is -4 degrees", -4),
        ("(-4)", -4),
        ("eighteen", None),
        ("", None),
        ("9" * 5000, None),
        ("#### 18.00", 18),
        ("#### 1/3", Fraction(1, 3)),
        ("#### ٣", None),
    ],
)
def test_numbers_are_read(text, answer):
    assert read_answer(text) == answer


@settings(max_examples=50, deadline=None)
@given(st.integers(-(10**12), 10**12), st.integers(0, 99), st.sampled_from(["", "$", "€"]))
def test_written_numbers_are_read_as_they_were(whole, cents, currency):
    value = Fraction(abs(whole) * 100 + cents, 100) * (-1 if whole < 0 else 1)
    sign = "-" if whole < 0 else ""
    for text in (f"{abs(whole):,}.{cents:02d}", f"{abs(whole)}.{cents:02d}"):
        assert read_marked_answer(f"so\n#### {sign}{currency}{text} in all") == value
        assert read_answer(f"7 and then {sign}{currency}{text}.") == value


@settings(max_examples=30, deadline=None)
@given(st.text(alphabet="#$-+.,/% 0123456789\nx<>", max_size=40))
def test_any_text_is_judged(text):
    assert judge_gsm8k(text, "#### 10").kind in (
        "right",
        "wrong",
        "no answer",
        "right without ####",
        "wrong without ####",
    )


@pytest.mark.parametrize(
    ("prediction", "kind"),
    [
        ("so #### 1,000.0", "right"),
        ("#### 1001", "wrong"),
        ("so 1000", "right without ####"),
        ("so 7", "wrong without ####"),
        ("#### ?", "no answer"),
    ],
)
def test_kinds(prediction, kind):
    judgement = judge_gsm8k(prediction, "x\n#### 1000")
    assert (judgement.kind, judgement.is_right) == (kind, kind.startswith("right"))


def test_references_without_number_are_refused():
    with pytest.raises(ValueError, match="must have a number.*got 'none'"):
        judge_gsm8k("#### 1", "none")


def test_metric_counts():
    metric = cllm_hf.GSM8KAccuracy()
    metric.add_batch(predictions=["#### 1", "2"], references=["#### 1", "#### 2"])
    metric.add(prediction="#### 4", reference="3")
    result = metric.compute()
    assert result["accuracy"] == 2 / 3 and (result["num_right"], result["num_answers"]) == (2, 3)
    assert result["kinds"] == {"right": 1, "right without ####": 1, "wrong": 1}
    assert 0 < result["interval"][0] < 2 / 3 < result["interval"][1] < 1
