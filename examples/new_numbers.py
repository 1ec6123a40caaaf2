"""
GSM8K problems with other numbers, from which a small model learns to take numbers from its prompt.

A model from nothing that only sees the 7,473 training problems remembers which numbers there are. Here some numbers
of a problem are replaced by others, in the question and in the answer, and every result is computed anew along the
calculator's annotations, `<<48/2=24>>`. Only problems in which it is plain where each number comes from are used.
"""

import ast
import operator
import random
import re
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction


_NUMBER = re.compile(r"\d+(?:,\d{3})+(?:\.\d+)?|\d*\.?\d+")
_EQUATION = re.compile(r"<<([^<>=]*)=([^<>=]*)>>")
# Numbers that a question says in words, so that it is not plain whether an equation has them from there.
_IN_WORDS = {
    2: "twice|double|half|halve|both|pair|couple|two|second",
    3: "thrice|triple|three|third",
    4: "quarter|four",
    5: "five|fifth",
    6: "six",
    7: "week|seven",
    8: "eight",
    9: "nine",
    10: "ten|dime",
    12: "dozen|year|month|annual|inch|feet|foot|twelve",
    24: "day|hour",
    25: "quarter",
    30: "month",
    52: "week|year",
    60: "hour|minute|second",
    100: "cent|percent|%|meter",
    365: "year|day",
}
_OPERATIONS: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_DRAWS = 20
_LARGEST = 100_000


def make_problems(rows: Sequence[tuple[str, str]], count: int, seed: int) -> list[tuple[str, str]]:
    """
    Make problems.

    Args:
        rows (`Sequence[tuple[str, str]]`): questions and answers, as published.
        count (`int`): how many to make.
        seed (`int`): the same seed makes the same ones.

    Returns:
        `list[tuple[str, str]]`: questions and answers.

    Raises:
        ValueError: if there is no problem whose numbers can be replaced.
    """
    rng = random.Random(seed)
    made: list[tuple[str, str]] = []
    usable = [row for row in rows if _drawable(*row)]
    while len(made) < count:
        before = len(made)
        for question, answer in rng.sample(usable, len(usable)):
            found = renumber(question, answer, rng)
            if found is not None and len(made) < count:
                made.append(found)
        if len(made) == before:
            raise ValueError(
                f"`new_numbers` takes problems with numbers in the question and equations such as <<48/2=24>> in the "
                f"answer, got none among {len(rows)}."
            )
    return made


def renumber(question: str, answer: str, rng: random.Random) -> tuple[str, str] | None:
    """
    Replace numbers of a problem by others of their kind, and compute its answer anew.

    Args:
        question (`str`): the question.
        answer (`str`): its answer, with annotations.
        rng (`random.Random`): draws the numbers.

    Returns:
        `tuple[str, str]`: question and answer; `None` if it is not plain where each number comes from, or no numbers
        were found for which all results are of the kind that they were.
    """
    drawable = _drawable(question, answer)
    if not drawable:
        return None
    kept = {_value(text) for text in _numbers(question)} - set(drawable)
    for _ in range(_DRAWS):
        changes = {value: value for value in kept} | {value: _draw_like(value, rng) for value in drawable}
        if len(set(changes.values())) < len(changes) or not _follow(answer, changes):
            continue
        made = _replace(answer, changes)
        if _holds(made):  # not where a number of the answer means two things
            return _replace(question, changes), made
    return None


def _drawable(question: str, answer: str) -> list[Fraction]:
    """Numbers of the question that the equations use, and that come from nowhere else."""
    if not _holds(answer):
        return []
    equations = _EQUATION.findall(answer)
    operands = {_value(text) for expression, _ in equations for text in _numbers(expression)}
    results = {_parse(result) for _, result in equations}
    text = question.lower()
    found = []
    for value in sorted({_value(text) for text in _numbers(question)} & operands - results):
        words = _IN_WORDS.get(int(value))
        if value.denominator == 1 and value >= 2 and not (words and re.search(words, text)):
            found.append(value)
    # What belongs to a fraction, a percentage, an ordinal or a time is more than a number.
    fixed = {_value(one) for one in re.findall(r"(\d+)(?:/|:|%| percent|st|nd|rd|th)", text)}
    fixed |= {_value(one) for one in re.findall(r"[/:](\d+)", text)}
    return [value for value in found if value not in fixed]


def _holds(answer: str) -> bool:
    """Whether all equations are right, and the last one gives the final number."""
    equations = _EQUATION.findall(answer)
    final = re.fullmatch(r"(?s).*\n#### *(\S+)", answer)
    if not equations or final is None or answer.count("<<") != len(equations):
        return False
    are_right = all(_parse(result) == _compute(expression) is not None for expression, result in equations)
    return are_right and _parse(equations[-1][1]) == _parse(final[1])


def _draw_like(value: Fraction, rng: random.Random) -> Fraction:
    """A number from half to twice as large, and as round."""
    step = next(step for step in (1000, 100, 10, 1) if value % step == 0)
    number = int(value) // step
    return Fraction(step * rng.randint(max(1 + (step == 1), number // 2), 2 * number + 1))


def _follow(answer: str, changes: dict[Fraction, Fraction]) -> bool:
    """Compute the results and add them to the changes; whether each is of its kind, and no number means two things."""
    for expression, old_text in _EQUATION.findall(answer):
        old, new = _parse(old_text), _compute(_replace(expression, changes))
        if old is None or new is None or not 0 < new < _LARGEST:
            return False
        if new.denominator != 1 and (old.denominator == 1 or new.denominator not in (2, 4, 5, 10, 20, 25, 50, 100)):
            return False
        if changes.setdefault(old, new) != new:
            return False
    return True


def _replace(text: str, changes: dict[Fraction, Fraction]) -> str:
    def change(match: re.Match[str]) -> str:
        old = _value(match[0])
        new = changes.get(old, old)
        return match[0] if new == old else _format(new, "," in match[0])

    return _NUMBER.sub(change, text)


def _format(value: Fraction, with_commas: bool) -> str:
    mark = "," if with_commas else ""
    if value.denominator == 1:
        return f"{int(value):{mark}}"
    return f"{float(value):{mark}.2f}".rstrip("0")


def _numbers(text: str) -> Iterator[str]:
    return (match[0] for match in _NUMBER.finditer(text))


def _value(text: str) -> Fraction:
    return Fraction(text.replace(",", ""))


def _parse(text: str) -> Fraction | None:
    found = _NUMBER.fullmatch(text.strip().lstrip("$"))
    return None if found is None else _value(found[0])


def _compute(expression: str) -> Fraction | None:
    """Sums, differences, products and quotients of numbers without a sign; `None` for anything else."""
    try:
        return _compute_node(ast.parse(expression.strip(), mode="eval").body, expression.strip())
    except (SyntaxError, ValueError, ZeroDivisionError):
        return None


def _compute_node(node: ast.AST, expression: str) -> Fraction:
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        left, right = _compute_node(node.left, expression), _compute_node(node.right, expression)
        return _OPERATIONS[type(node.op)](left, right)
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        return Fraction(str(expression[node.col_offset : node.end_col_offset]))
    raise ValueError(f"Only numbers and + - * / can be computed, got {expression!r}.")
