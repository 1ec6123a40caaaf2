"""Tables and pictures for a terminal."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence


_BLUE, _RED, _RESET = "\033[34m", "\033[31m", "\033[0m"
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
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first = cells[0].ljust(widths[0])
        return "| " + " | ".join([first, *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:]))]) + " |"

    rule = "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])])
    return "\n".join([line(header), f"|{rule}|", *map(line, rows)])


def format_trajectory(
    states: Sequence[Sequence[int]], decode: Callable[[int], str], color: bool = True, length: int | None = None
) -> str:
    """
    Draw the states of a block, one a line: tokens that are right blue, tokens that are wrong red.

    Args:
        states (`Sequence[Sequence[int]]`): from the first draft to the fixed point.
        decode (`Callable[[int], str]`): text of a token.
        color (`bool`): whether to color; otherwise wrong tokens stand in brackets.
        length (`int`, *optional*): tokens of the block to show; by default all.

    Returns:
        `str`.
    """
    shown = [state[:length] for state in states]
    texts = [[decode(token) for token in state] for state in shown]
    # Without color the brackets take two columns.
    widths = [
        max(display_width(text[column]) for text in texts) + (0 if color else 2) for column in range(len(shown[-1]))
    ]
    lines = []
    for number, (state, text) in enumerate(zip(shown, texts)):
        cells = []
        for token, right, word, width in zip(state, shown[-1], text, widths):
            is_right = token == right
            word = word if color or is_right else f"[{word}]"
            padded = word + " " * (width - display_width(word))
            cells.append(f"{_BLUE if is_right else _RED}{padded}{_RESET}" if color else padded)
        lines.append(f"{number:3d}  {' '.join(cells)}".rstrip())
    return "\n".join(lines)


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
        line (`str`): printable text with the color codes of `format_trajectory`.

    Returns:
        `int`.
    """
    return display_width(_COLOR.sub("", line))
