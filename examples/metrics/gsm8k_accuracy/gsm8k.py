"""Whether an answer to a problem of GSM8K is right."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable
from fractions import Fraction

from cllm_hf.evaluation.judgements import Judgement

from .written_numbers import find_numbers, plain_numbers, read_number


MARKER = "####"
# A longer text, which no model is asked for, has no answer.
_MAX_LENGTH = 500_000
# What may stand between the marker and the number of an answer.
_BEFORE_NUMBER = re.compile(
    r"(?:[\s#*_`:=(\[{~≈$£€¥₹+-]|\\[(\[]|\\[a-z]{1,12}(?=\s?[{$\d-]))*(?:[A-Z]{1,3}[$€£])?\.?(?=\d)"
)
_STEP = re.compile(
    r"[\W_]*(?:step|part|case|phase|stage|section|point|task|question|problem|method|approach|option|scenario|example)"
    r"s?\W{0,3}\d",
    re.IGNORECASE,
)
_COUNTED = re.compile(r"[\W_]*(?:[A-Za-z]+ (?P<named>\d{1,3})|(?P<bare>\d{1,3})[.):]\W{0,4}[A-Za-z])")
_NAMES_ANSWER = re.compile(r"\b(?:answer|total|result|solution|conclusion|final)\b", re.IGNORECASE)
_BOXED = re.compile(r"\\f?boxed\s?(?:\{(?P<content>[^{}\n]*(?:\{[^{}\n]*\}[^{}\n]*){0,9})|(?P<bare>\S{1,50}))")
_SPACED = re.compile(r"[\W_]*\d{1,3}(?: \d{3})+[\W_]*$")


def read_answer(text: str) -> Fraction | None:
    """
    Read the number that a text gives as its answer.

    It is that of `read_marked_answer`; else it is the number in the last `\\boxed{...}`, and without such a box the
    last number of the text. Numbers are read as they are written in plain text, Markdown and
    LaTeX, see `written_numbers`: thousands in every style, currency signs, a percent sign and units are left out
    (`$1,234.50` is 1234.5, `50%` is 50); `12.` at the end of a sentence is 12, `3/4` and `\\frac{3}{4}` are the
    fraction, `1 1/2` is one and a half, `1.5e3` and `1.5 \\times 10^3` are 1500.
    Calculations in `<<...>>`, exponents and indices are passed over. Words such as "half" or "million" are not read.

    Args:
        text (`str`): a response, or an answer of the data set.

    Returns:
        `fractions.Fraction`, *optional*: exact, so that 18.00 equals 18. `None` if there is no number, or if it is a
            fraction over zero or has more than 40 digits, and for a text of more than 500,000 characters.
    """
    return _read(text)[0]


def read_marked_answer(text: str) -> Fraction | None:
    """
    Read the number that is marked by `####`.

    `####` is also a heading of Markdown. The first line where a number follows the marker directly goes first, then
    one with a `\\boxed{...}`. Where the text has no box either, the first line that names an answer or a result is
    taken, then the first with a number at all. Headings that are counted (`#### Step 1`, or several such as `#### 1.
    Count the eggs`) mark no answer.

    Args:
        text (`str`): a response, or an answer of the data set.

    Returns:
        `fractions.Fraction`, *optional*: `None` if there is no such line.
    """
    answer, is_marked = _read(text)
    return answer if is_marked else None


def judge_gsm8k(prediction: str, reference: str) -> Judgement:
    """
    Judge a response by its number.

    Args:
        prediction (`str`): a response.
        reference (`str`): the answer of the data set, its text or the number alone.

    Returns:
        `Judgement`: of the kind `"right"`, `"wrong"`, `"right without ####"`, `"wrong without ####"`, where the number
            in a box or the last number of the response was taken, or `"no answer"`.

    Raises:
        ValueError: if the reference has no number.
    """
    expected = read_answer(reference)
    if expected is None:
        raise ValueError(f"A reference of GSM8K must have a number, as in '#### 18', got {reference!r:.200}.")
    answer, is_marked = _read(prediction)
    if answer is None:
        return Judgement(False, "no answer")
    kind = "right" if answer == expected else "wrong"
    return Judgement(answer == expected, kind if is_marked else f"{kind} without {MARKER}")


def _read(text: str) -> tuple[Fraction | None, bool]:
    """The answer, and whether it is marked."""
    if len(text) > _MAX_LENGTH:
        return None, False
    text = plain_numbers(text)
    lines = _marked_lines(text)
    for candidate, is_marked in (
        (_find(_BEFORE_NUMBER.match, lines), True),
        (_content_of_box(_find(_BOXED.search, lines)), True),
        (_content_of_box(text), False),
        (_after_colon(_find(_NAMES_ANSWER.search, lines)), True),
        (lines[0] if lines else "", True),
    ):
        answer = _read_first(candidate)
        if answer is not None:
            return answer, is_marked
    numbers = deque(find_numbers(text), maxlen=1)
    return (read_number(numbers[0]) if numbers else None), False


def _marked_lines(text: str) -> list[str]:
    """What stands after each marker, if it has a digit and is not a heading that is counted."""
    lines = [line.partition("\n")[0] for line in text.split(MARKER)[1:]]
    lines = [line for line in lines if re.search("[0-9]", line) and not _STEP.match(line)]
    counted = {line: int(match["named"] or match["bare"]) for line in lines if (match := _COUNTED.match(line))}
    if len(counted) > 1 and list(counted.values()) == list(range(1, len(counted) + 1)):
        lines = [line for line in lines if line not in counted]
    return lines


def _find(is_wanted: Callable[[str], object], lines: list[str]) -> str:
    return next((line for line in lines if is_wanted(line)), "")


def _content_of_box(text: str) -> str:
    """What the last `\\boxed{...}` holds. A dash at its beginning is a minus."""
    boxes = deque(_BOXED.finditer(text), maxlen=1)
    content = (boxes[0]["content"] or boxes[0]["bare"] or "") if boxes else ""
    return re.sub(r"^\s{0,3}-\s", "-", content)


def _after_colon(line: str) -> str:
    """Of `Total of 3 eggs: 18` what is after the colon, if there is a number."""
    after = line.partition(":")[2]
    return after if re.search("[0-9]", after) else line


def _read_first(line: str) -> Fraction | None:
    """The first number of a line that gives an answer; of `5 eggs + 3 eggs = 8 eggs` what is on the right."""
    if _SPACED.match(line):
        line = re.sub(r"(?<=\d) (?=\d)", "", line)
    left, right = _sides(line)
    # On the left of a calculation is more than one number. One alone may be the answer: `18 (as x = 3)`.
    if len(re.findall(r"\d[\d.,/]*", left)) > 1 and re.search(r"\d", right) and not re.search(r"[*÷+]", right):
        line = "=" + right
    number = next(find_numbers(line), None)
    return read_number(number) if number else None


def _sides(line: str) -> tuple[str, str]:
    """What is left and right of the last equals sign of a line outside of brackets; both are empty without one."""
    depth, place = 0, None
    for number, character in enumerate(line):
        depth += (character == "(") - (character == ")")
        if character == "=" and depth <= 0:
            place = number
    return ("", "") if place is None else (line[:place], line[place + 1 :])
