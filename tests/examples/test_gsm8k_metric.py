"""GSM8K: which number is the answer."""

import json
import re
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from metrics.gsm8k_accuracy.gsm8k import judge_gsm8k, read_answer, read_marked_answer
from metrics.gsm8k_accuracy.gsm8k_accuracy import GSM8KAccuracy


METRICS = Path(__file__).parents[2] / "examples" / "metrics"
GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k"


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
        ("#### 9 eggs * $2 = $18", 18),
        ("#### $2 per egg * 9 eggs = $18 per day", 18),
        ("#### Total cost = 3 + 5 = 8", 8),
        ("#### 60 minutes / 4 = 15 minutes", 15),
        ("#### 50% of 36 = 18", 18),
        ("#### (9)(2) = 18", 18),
        ("#### 48/2 = 24", 24),
        ("#### 18 = 9 * 2", 18),
        ("#### 18 (as x = 3)", 18),
        ("#### 18, where x = 3", 18),
    ],
)
def test_numbers_are_read(text, answer):
    assert read_answer(text) == answer


WRITTEN = {
    "bullets and dashes": [
        ("Total:\n- 18 dollars", 18),
        ("**Answer** - $18", 18),
        ("The final answer - 18", 18),
        ("x is\n- 18", 18),
        ("a\n— 18", 18),
        ("- **18**", 18),
        ("* 18", 18),
        ("• 18", 18),
        ("#### - 5", 5),
        ("- -5", -5),
        ("5 - 3", 3),
        ("10–12", 12),
        ("step-5", 5),
        ("he has—18", 18),
        ("--5", 5),
    ],
    "minus": [
        *((f"The answer is {dash}5", -5) for dash in "-−–—‐‑‒﹣－"),
        ("x = - 5", -5),
        ("= −5", -5),
        ("(- 5)", -5),
        ("Total: - 5", -5),
        ("-$5", -5),
        ("$-5", -5),
        ("-\\$5", -5),
        ("−€5", -5),
        ("-$ 5", -5),
        ("-**5**", -5),
        ("**-5**", -5),
        ("#### -.5", Fraction(-1, 2)),
        ("\\boxed{- 5}", -5),
        ("negative 5", -5),
        ("5–2 = −3", -3),
    ],
    "thousands": [
        *((text, 9500) for text in (r"\boxed{9{,}500}", r"is \$9{,}500.", r"\(9\,500\)", r"$9,\!500$", r"9\;500")),
        *((f"9{space}500 euros", 9500) for space in "\u202f\u00a0\u2009'’_"),
        (r"9\text{,}500", 9500),
        (r"1{,}000{,}000", 10**6),
        (r"1\,000\,000", 10**6),
        ("1.234.567", 1234567),
        ("1.234,56", Fraction("1234.56")),
        ("1,00,000", 100000),
        ("#### 9 500", 9500),
        ("5 000 dollars", 5000),
        ("1 234 050.5", Fraction("1234050.5")),
        ("2 100 dollar bills", 100),
        ("#### £1 000", 1000),
        ("#### 3 100 dollar bills", 3),
    ],
    "fractions": [
        *((text, Fraction(1, 2)) for text in (r"\boxed{\frac{1}{2}}", r"\dfrac12", r"\tfrac{1}2")),
        (r"#### \frac{1}{2}", Fraction(1, 2)),
        (r"\frac{1,000}{2}", 500),
        *((text, Fraction(1, 2)) for text in ("½", "is 1/2.", "1⁄2", r"{1 \over 2}")),
        *((text, Fraction(-1, 2)) for text in ("-½", r"\frac{-1}{2}", r"$x = -\frac{1}{2}$", "−1/2")),
        *((text, Fraction(3, 2)) for text in (r"1\frac{1}{2}", r"1 \frac{1}{2}", "1½", "1 ½", "1 and 1/2", "1 1/2")),
    ],
    "powers and units": [
        *((text, 1000) for text in ("1e3", "1.0E+3", r"1 \times 10^3", "1 × 10³", "1*10^{3}", "10^3", "10³")),
        ("1e-2", Fraction(1, 100)),
        ("2**3 = 8", 8),
        *((f"18{unit}", 18) for unit in (" m^2", " m²", " cm2", r" \text{ cm}^{2}", r"^\circ", r"\%", "th", "%")),
        ("x_1 = 18 = y_1", 18),
        ("Rs.18", 18),
        ("US$18", 18),
        ("１８", 18),
    ],
    "Markdown and LaTeX": [
        *((f"so 5\n#### {text}\n7", 18) for text in ("**18**", "`18`", r"\boxed{18}", r"$\boxed{18}$", r"\(18\)")),
        *((f"so 5\n#### {text}\n7", 18) for text in (r"\text{18}", r"\$18", "US$18", "= 18", "x = 18", "18 (16-3=9)")),
        ("##### 18", 18),
        ("#### 9 * 2 = 18", 18),
        ("#### 18 = 9*2", 18),
        ("#### <<9*2=18>>18", 18),
        (r"It is \boxed{18}. That took 3 steps.", 18),
        (r"\boxed{x = 18}", 18),
        (r"\boxed{18 \text{ dollars}}", 18),
        (r"\boxed{18} so #### 20", 20),
    ],
    "headings": [
        ("#### Step 1: count\n16 - 7 = 9\n#### Step 2: multiply\n9 * 2 = 18\n#### Answer\n#### 18", 18),
        ("#### Step 1: count 5\n#### Step 2: multiply\n9 * 2 = 18", 18),
        ("#### 1. Count\n= 9\n#### 2. Multiply\n9 * 2 = 18", 18),
        ("#### Day 1\n9\n#### Day 2\n9 * 2 = 18", 18),
        ("#### 18. That is all.\n#### 7", 18),
        ("#### 18. That is all.", 18),
        ("#### Sum of 2\n#### Final Answer: $18\n#### Check 5", 18),
        ("#### Answer: **$1,234.50**", Fraction("1234.5")),
        ("#### He has 18 eggs", 18),
        ("#### Cost of 3 eggs\n3 * 6 = \\boxed{18}", 18),
        ("#### Of the 3 eggs $\\boxed{18}$ are left\n\\boxed{7}", 18),
        ("#### Total for 3 eggs: 9 * 2 = 18", 18),
        ("#### Final answer: 18 at 2:30", 18),
    ],
    "limits": [
        ("1e999999999", None),
        ("#### 1e-99999", None),
        ("1/" + "9" * 100_000, None),
        ("1" + ",000" * 20_000, None),
        ("18 " * 200_000, None),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "answer"), [pair for pairs in WRITTEN.values() for pair in pairs], ids=lambda v: repr(v)[:40]
)
def test_numbers_are_read_as_people_and_models_write_them(text, answer):
    assert read_answer(text) == answer


@pytest.mark.skipif(not GSM8K.exists(), reason="needs the data of GSM8K")
def test_answers_of_the_data_set_are_read():
    """By the published pattern, which all of them fit."""
    for line in (GSM8K / "test.jsonl").read_text().splitlines():
        answer = json.loads(line)["answer"]
        published = re.search(r"#### (-?[0-9.,]+)", answer).group(1).replace(",", "")
        assert read_marked_answer(answer) == Fraction(published)
        assert judge_gsm8k(f"So it is {published}.", answer).kind == "right without ####"


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
        ("#### Thus \\boxed{1000}", "right"),
        ("#### Cost of 3\n\\boxed{1000}", "right without ####"),
    ],
)
def test_kinds(prediction, kind):
    judgement = judge_gsm8k(prediction, "x\n#### 1000")
    assert (judgement.kind, judgement.is_right) == (kind, kind.startswith("right"))


def test_references_without_number_are_refused():
    with pytest.raises(ValueError, match="must have a number.*got 'none'"):
        judge_gsm8k("#### 1", "none")


def test_metric_counts():
    metric = GSM8KAccuracy()
    metric.add_batch(predictions=["#### 1", "2"], references=["#### 1", "#### 2"])
    metric.add(prediction="#### 4", reference="3")
    result = metric.compute()
    assert result["accuracy"] == 2 / 3 and (result["num_right"], result["num_answers"]) == (2, 3)
    assert result["kinds"] == {"right": 1, "right without ####": 1, "wrong": 1}
    assert 0 < result["interval"][0] < 2 / 3 < result["interval"][1] < 1


def test_the_former_name_says_where_it_is_now():
    with pytest.raises(ImportError, match="examples/metrics/gsm8k_accuracy"):
        from cllm_hf import GSM8KAccuracy  # noqa: F401
