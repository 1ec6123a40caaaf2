"""Whether two results of queries say the same, whatever the order of their columns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any


# Cells that are looked at again while columns are paired by trial. Only tables where many columns look alike in all
# that the search sees, such as those of a strongly regular graph, have more.
_MAX_CELLS_TRIED = 2_000_000
_MIN_TRIES = 64


def results_match(
    gold_rows: Sequence[Sequence[Any]], predicted_rows: Sequence[Sequence[Any]], is_ordered: bool
) -> bool:
    """
    Whether some order of the predicted columns makes both results equal.

    Values are compared as Python does: 1 equals 1.0, no number equals a text, NULL equals NULL. Two results without
    rows are equal, whatever their columns. The search has a limit, at which two tables count as different.

    Args:
        gold_rows (`Sequence[Sequence]`): rows of one length.
        predicted_rows (`Sequence[Sequence]`): rows of one length.
        is_ordered (`bool`): whether rows must come in the same order; otherwise they must be the same as often.

    Returns:
        `bool`.
    """
    if len(gold_rows) != len(predicted_rows):
        return False
    if not gold_rows:
        return True
    if len(gold_rows[0]) != len(predicted_rows[0]):
        return False
    # Equal values get equal numbers, as keys of a dictionary are compared by value.
    numbers: dict[Any, int] = {}
    gold, predicted = (
        [tuple(numbers.setdefault(value, len(numbers)) for value in row) for row in rows]
        for rows in (gold_rows, predicted_rows)
    )
    if is_ordered:
        # Row i belongs to row i, so that each column stands for itself.
        return Counter(zip(*gold)) == Counter(zip(*predicted))
    gold_counts, predicted_counts = Counter(gold), Counter(predicted)
    if gold_counts == predicted_counts:
        return True
    if sorted(gold_counts.values()) != sorted(predicted_counts.values()):
        return False
    colors = [0] * len(gold[0])
    num_tries = max(_MIN_TRIES, _MAX_CELLS_TRIED // (len(gold) * len(gold[0])))
    return _can_permute(gold_counts, predicted_counts, colors, colors, iter(range(num_tries)))


def _can_permute(
    gold: Counter[tuple[int, ...]],
    predicted: Counter[tuple[int, ...]],
    gold_colors: list[int],
    colors: list[int],
    tries: Iterator[int],
) -> bool:
    """
    Whether a permutation that keeps colors makes two multisets of rows equal.

    The search is that for an isomorphism: columns are told apart by what stands in them, then by the rows that it
    stands in, and so on (`_refine`). Where columns remain that this does not tell apart, one of them is paired with
    each of its candidates in turn, which tells others apart. Candidates with the same content are tried once.

    Args:
        gold (`Counter`): rows and how often they come.
        predicted (`Counter`): the same.
        gold_colors (`list[int]`): of the columns of `gold`.
        colors (`list[int]`): of the columns of `predicted`.
        tries (`Iterator[int]`): ends where the search does.

    Returns:
        `bool`.
    """
    if next(tries, None) is None:
        return False
    refined = _refine(gold, predicted, gold_colors, colors)
    if refined is None:
        return False
    gold_colors, colors = refined
    sizes = Counter(gold_colors)
    ambiguous = [color for color, size in sizes.items() if size > 1]
    if not ambiguous:
        order = [colors.index(color) for color in gold_colors]
        return gold == Counter({tuple(row[column] for column in order): n for row, n in predicted.items()})
    color = min(ambiguous, key=lambda color: sizes[color])
    paired = gold_colors.copy()
    paired[gold_colors.index(color)] = -1
    contents = list(zip(*predicted))
    tried = set()
    for column in range(len(colors)):
        if colors[column] == color and contents[column] not in tried:
            tried.add(contents[column])
            if _can_permute(gold, predicted, paired, [*colors[:column], -1, *colors[column + 1 :]], tries):
                return True
    return False


def _refine(
    gold: Counter[tuple[int, ...]], predicted: Counter[tuple[int, ...]], gold_colors: list[int], colors: list[int]
) -> tuple[list[int], list[int]] | None:
    """Finer colors, which every permutation that makes the two equal must keep; `None` if there is no such."""
    while True:
        row_names: dict[int, int] = {}
        column_names: dict[int, int] = {}
        gold_rows = _color_rows(gold, gold_colors, row_names)
        predicted_rows = _color_rows(predicted, colors, row_names)
        if Counter(gold_rows) != Counter(predicted_rows):
            return None
        new_gold = _color_columns(gold, gold_rows, gold_colors, column_names)
        new = _color_columns(predicted, predicted_rows, colors, column_names)
        if sorted(new_gold) != sorted(new):
            return None
        if len(set(new_gold)) == len(set(gold_colors)):
            return new_gold, new
        gold_colors, colors = new_gold, new


def _color_rows(rows: Counter[tuple[int, ...]], colors: list[int], names: dict[int, int]) -> list[int]:
    signatures = ((count, *sorted(zip(colors, row))) for row, count in rows.items())
    return _name(signatures, names)


def _color_columns(
    rows: Counter[tuple[int, ...]], row_colors: list[int], colors: list[int], names: dict[int, int]
) -> list[int]:
    signatures = ((color, *sorted(zip(row_colors, column))) for color, column in zip(colors, zip(*rows)))
    return _name(signatures, names)


def _name(signatures: Iterable[tuple[Any, ...]], names: dict[int, int]) -> list[int]:
    """Equal numbers for equal signatures. Hashes stand for them: where two are equal by chance, colors are coarser."""
    return [names.setdefault(hash(signature), len(names)) for signature in signatures]
