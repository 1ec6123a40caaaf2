"""
Answers to problems of GSM8K as models may write them, mutated at random: none hangs, and none raises an exception.

`FUZZ_CASES=100000 pytest -s -m slow tests/fuzz/test_fuzz_numbers.py` tries as many; `FUZZ_SEED` gives other ones.
"""

import random
from fractions import Fraction

import pytest
from fuzzing import SEED, num_cases, run_cases
from metrics.gsm8k_accuracy.gsm8k import judge_gsm8k, read_answer, read_marked_answer


KINDS = ("right", "wrong", "no answer", "right without ####", "wrong without ####")
PIECES = [
    *(
        "#### ",
        "18 ",
        "\n",
        "-",
        "– ",
        "−",
        " ",
        "\u202f",
        "$",
        "€",
        ",",
        "{,}",
        ".",
        "/",
        "{",
        "}",
        "^2",
        "^{",
        "e",
        "e9",
    ),
    *("1e999999999", "<<", ">>", "=", "(", ")", ":", "*", "**", "__", "%", "½", "3½", "10^", "×", "and 1/2", "Step 1"),
    *("Answer", "0", "00", "000", "1,000", "1.000", "٣", "１８", "\ud800", "negative ", "m2", "²", "\0", "18. "),
    *(r"\$", r"\,", r"\!", r"\frac", r"\dfrac{1}{2}", r"\boxed{", r"\times 10^{3}", r"\text{"),
]
NOISE = [
    "He has 5 eggs.",
    "- 7 of 8",
    r"\boxed{9}",
    "3/4",
    "1 000",
    "½",
    "x^2 = 16",
    "<<4*4=16>>",
    "Step 3: 7",
    "2e5",
    "**6**",
]


def make_answer(number):
    """Pieces in a row, some of them many times."""
    generator = random.Random(f"{SEED} {number}")
    pieces = [generator.choice(PIECES) for _ in range(generator.choice([1, 5, 20]))]
    place = generator.randrange(len(pieces))
    pieces[place] *= generator.choice([1, 2, 50, 500])
    return "".join(pieces) * generator.choice([1, 1, 1, 10])


def judge(answer):
    judgement = judge_gsm8k(answer, "#### 18")
    assert judgement.kind in KINDS and judgement.is_right == judgement.kind.startswith("right")
    assert (judgement.kind in ("right", "wrong")) == (read_marked_answer(answer) is not None)
    return judgement.kind


def write(value, generator):
    """A number in one of many ways."""
    sign = generator.choice("-−–") if value < 0 else ""
    size = abs(value)
    if size.denominator > 1:
        whole, rest = divmod(size.numerator, size.denominator)
        mixed = (
            [f"{whole} {rest}/{size.denominator}", rf"{whole}\frac{{{rest}}}{{{size.denominator}}}"] if whole else []
        )
        improper = [f"{size.numerator}/{size.denominator}", rf"\frac{{{size.numerator}}}{{{size.denominator}}}"]
        return sign + generator.choice(improper + mixed)
    separator = generator.choice(["", ",", "{,}", r"\,", r"\!", r"\;", ",\\!", "\u202f", "\u00a0", "\u2009", "'", "_"])
    digits = f"{size.numerator:,}".replace(",", separator)
    currency = generator.choice(["", "", "$", r"\$", "€", "US$"])
    return sign + currency + digits + generator.choice(["", ".00", ".", "%", " eggs", r"\%", " m^2", r" \text{ cm}"])


def check_written(number):
    generator = random.Random(f"{SEED} written {number}")
    value = Fraction(generator.choice([1, -1]) * generator.randrange(10 ** generator.randint(1, 9)))
    if generator.random() < 0.3:
        value /= generator.randint(2, 9)
    text = write(value, generator)
    noise = " ".join(generator.choices(NOISE, k=3))
    before, after = generator.choice(
        [("", ""), ("**", "**"), (r"\boxed{", "}"), (r"$\boxed{", "}$"), ("`", "`"), (r"\(", r"\)")]
    )
    marked = f"{noise}\n#### Step 1\n{noise}\n#### {before}{text}{after}\n{noise}"
    assert read_marked_answer(marked) == value, marked
    assert read_answer(f"{noise}\n\\boxed{{{text}}}\nin 2 steps") == value, text
    assert read_answer(f"3 and 4, so the answer is {text}") == value, text
    return "read"


def test_mutated_answers_are_judged():
    assert len(run_cases(map(make_answer, range(300)), judge)) == len(KINDS)


def test_numbers_are_read_however_they_are_written():
    run_cases(range(300), check_written)


@pytest.mark.slow
def test_many_answers_are_judged():
    run_cases(map(make_answer, range(1000, 1000 + num_cases(5000))), judge)
    run_cases(range(1000, 1000 + num_cases(5000)), check_written)
