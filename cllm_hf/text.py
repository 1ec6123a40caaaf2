"""Plain text for a terminal: tables, and how wide a line is."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from .cards import escape_bars


_COLOR = re.compile("\033\\[[0-9]+m")


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


def display_width(text: str) -> int:
    """
    Columns of a terminal that a text takes.

    Args:
        text (`str`): printable text.

    Returns:
        `int`: 2 for each wide character, such as Chinese ones, 0 for each combining one, 1 for all others.
    """
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(text) + wide - sum(unicodedata.combining(character) > 0 for character in text)


def plain_width(line: str) -> int:
    """
    Columns of a terminal that a line takes which may be colored.

    Args:
        line (`str`): printable text with color codes.

    Returns:
        `int`.
    """
    return display_width(_COLOR.sub("", line))
