"""Whether an answer to a problem of GSM8K is right."""

from __future__ import annotations

import re
from fractions import Fraction

from ..judgements import Judgement


MARKER = "####"
_WHOLE = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_NUMBER = re.compile(
    rf"""
    (?P<sign> (?<![\w)%.]) [-−+] \s? )?                  # not the minus of 16-3
    [$€£]? (?P<inner_sign> (?<=[$€£]) [-−] )? \s?
    (?: (?P<mixed> [0-9]+ ) \s+ (?=[0-9]+/) )?            # the 1 of 1 1/2
    (?: (?P<numerator> {_WHOLE} ) / (?P<denominator> {_WHOLE} ) (?![0-9/.])
      | (?P<decimal> {_WHOLE} (?:\.[0-9]+)? | \.[0-9]+ ) )
    """,
    re.VERBOSE,
)
_CALCULATION = re.compile(r"<<[^<>\n]*>>")
# Python refuses to read an integer of more than 4300 digits, and no answer has this many.
_MAX_DIGITS = 40


def read_answer(text: str) -> Fraction | None:
    """
    Read the number that a text gives as its answer.

    It is the first number on the line of the first `####` that has a number behind it, as in the data set; without
    such a line it is the last number of the text. Commas between thousands, currency signs, a percent sign and units
    are left out (`$1,234.50` is 1234.5, `50%` is 50); `12.` at the end of a sentence is 12, `3/4` is the fraction, and
    `1 1/2` is one and a half.
    Calculations in `<<...>>` are passed over. Words such as "half" or "million", `½` and powers of ten such as `1e3`
    are not read.

    Args:
        text (`str`): a response, or an answer of the data set.

    Returns:
        `fractions.Fraction`, *optional*: exact, so that 18.00 equals 18. `None` if there is no number, or if it is a
            fraction over zero or has more than 40 digits.
    """
    marked = read_marked_answer(text)
    if marked is not None:
        return marked
    numbers = list(_NUMBER.finditer(_CALCULATION.sub(" ", text)))
    return _to_fraction(numbers[-1]) if numbers else None


def read_marked_answer(text: str) -> Fraction | None:
    """
    Read the number behind `####`.

    Args:
        text (`str`): a response, or an answer of the data set.

    Returns:
        `fractions.Fraction`, *optional*: `None` if there is no `####` with a number on its line.
    """
    for line in text.split(MARKER)[1:]:
        number = _NUMBER.search(line.partition("\n")[0])
        if number:
            return _to_fraction(number)
    return None


def judge_gsm8k(prediction: str, reference: str) -> Judgement:
    """
    Judge a response by its number.

    Args:
        prediction (`str`): a response.
        reference (`str`): the answer of the data set, its text or the number alone.

    Returns:
        `Judgement`: of the kind `"right"`, `"wrong"`, `"right without ####"`, `"wrong without ####"`, where the last
            number of the response was taken, or `"no answer"`.

    Raises:
        ValueError: if the reference has no number.
    """
    expected = read_answer(reference)
    if expected is None:
        raise ValueError(f"A reference of GSM8K must have a number, as in '#### 18', got {reference!r}.")
    answer = read_answer(prediction)
    if answer is None:
        return Judgement(False, "no answer")
    kind = "right" if answer == expected else "wrong"
    is_marked = read_marked_answer(prediction) is not None
    return Judgement(answer == expected, kind if is_marked else f"{kind} without {MARKER}")


def _to_fraction(number: re.Match[str]) -> Fraction | None:
    parts = [(number[name] or "").replace(",", "") for name in ("decimal", "numerator", "denominator", "mixed")]
    if max(map(len, parts)) > _MAX_DIGITS:
        return None
    decimal, numerator, denominator, mixed = parts
    if numerator and int(denominator) == 0:
        return None
    value = Fraction(int(numerator), int(denominator)) if numerator else Fraction(decimal)
    value += int(mixed or 0)
    is_negative = "+" not in (number["sign"] or "+") or number["inner_sign"] is not None
    return -value if is_negative else value
