"""Plain text for a terminal: tables."""

from __future__ import annotations

from collections.abc import Sequence

from .cards import escape_bars


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """
    Format a Markdown table; the first column is aligned on the left, the others on the right.

    Args:
        header (`Sequence[str]`): names of the columns.
        rows (`Sequence[Sequence[str]]`): cells.

    Returns:
        `str`.
    """
    header, *rows = [[escape_bars(" ".join(cell.splitlines())) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first = cells[0].ljust(widths[0])
        return "| " + " | ".join([first, *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:]))]) + " |"

    rule = "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])])
    return "\n".join([line(header), f"|{rule}|", *map(line, rows)])
