"""Looking at trajectories in a terminal: a record, or blocks side by side."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

from ..text import display_width, plain_width
from .block import BlockTrajectory


_LONGEST_TOKEN = 20
_MARGIN = 5  # columns of the number of a state
_GAP = 4  # columns between two blocks
_BLUE, _RED, _RESET = "\033[34m", "\033[31m", "\033[0m"


def format_record(
    record: Mapping[str, Any],
    decode: Callable[[int], str],
    color: bool = True,
    blocks: Sequence[int] | None = None,
    width: int | None = None,
) -> str:
    """
    Draw a trajectory record: its prompt, its response, and the states of its blocks, a line each.

    Tokens that are right are blue, wrong ones red; without color wrong ones stand in brackets. Padding after the end
    of the response is left out. Blocks that are too wide are drawn in several parts, one below the other.

    Args:
        record (`Mapping[str, Any]`): with the columns of `cllm_hf.FEATURES`; without `is_greedy` it is taken as true.
        decode (`Callable[[int], str]`): text of a token.
        color (`bool`): whether to color.
        blocks (`Sequence[int]`, *optional*): numbers of the blocks to draw; by default all.
        width (`int`, *optional*): columns of the terminal; by default those of the present one.

    Returns:
        `str`.

    Raises:
        ValueError: for a block that the record does not have, or a record whose blocks do not cover its response.
    """
    if width is None:
        width = terminal_width()
    states = record["states"]
    numbers = list(range(len(states)) if blocks is None else blocks)
    outside = [number for number in numbers if not 0 <= number < len(states)]
    if outside:
        raise ValueError(f"`blocks` must be from 0 to {len(states) - 1}, got {outside[0]}. Choose one of those.")
    greedy = "" if record.get("is_greedy") is not False else ", not all of it greedy"
    parts = [
        f"`data_id` {record.get('data_id', '?')}: a prompt of {len(record['prompt_ids'])} tokens, a response of "
        f"{len(record['response_ids'])} tokens{greedy}",
        f"Prompt:\n{indented(record.get('prompt', ''))}",
        f"Response:\n{indented(record.get('response', ''))}",
        *(_format_block(record, number, decode, color, width) for number in numbers),
    ]
    return "\n\n".join(parts)


def format_blocks(
    blocks: Sequence[BlockTrajectory], decode: Callable[[int], str], color: bool = True, width: int | None = None
) -> str:
    """
    Draw the trajectories of blocks, each under its name and what was counted on it, right tokens blue, wrong ones red.

    They stand side by side if the terminal is wide enough, otherwise one below the other.

    Args:
        blocks (`Sequence[BlockTrajectory]`): what to draw, such as the same block of two models.
        decode (`Callable[[int], str]`): text of a token.
        color (`bool`): whether to color; otherwise wrong tokens stand in brackets.
        width (`int`, *optional*): columns of the terminal; by default those of the present one.

    Returns:
        `str`.
    """
    if width is None:
        width = terminal_width()
    whole = [_headed(block, _format_states(block, decode, color, width=sys.maxsize)) for block in blocks]
    if sum(max(map(plain_width, lines)) + _GAP for lines in whole) - _GAP <= width:
        lines: list[str] = []
        for more in whole:
            lines = _beside(lines, more) if lines else more
        return "\n".join(lines)
    return "\n\n".join("\n".join(_headed(block, _format_states(block, decode, color, width))) for block in blocks)


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


def _headed(block: BlockTrajectory, states: str) -> list[str]:
    return [*([block.name] if block.name else []), block.describe(), *states.split("\n")]


def visible_tokens(blocks: Iterable[BlockTrajectory], decode: Callable[[int], str]) -> dict[int, str]:
    """
    The texts of all tokens of some blocks, for a table.

    Args:
        blocks (`Iterable[BlockTrajectory]`): the blocks.
        decode (`Callable[[int], str]`): text of a token.

    Returns:
        `dict[int, str]`: what `visible_token` gives, by token.
    """
    tokens = sorted({token for block in blocks for state in block.states for token in state})
    return {token: visible_token(decode(token)) for token in tokens}


def terminal_width() -> int:
    """
    Columns of the present terminal.

    Returns:
        `int`: 120 where there is no terminal.
    """
    return shutil.get_terminal_size(fallback=(120, 24)).columns


def visible_token(text: str) -> str:
    """
    The text of a token for a table: what is not printable is escaped, long texts are cut, nothing but spaces shows as
    that many `␣`, and an empty text as `''`.

    Args:
        text (`str`): its text.

    Returns:
        `str`: a line without tabs and control characters.
    """
    text = "".join(character if character.isprintable() else _escaped(character) for character in text)
    if not text.strip(" "):
        text = "␣" * len(text) or "''"
    return text if len(text) <= _LONGEST_TOKEN else f"{text[: _LONGEST_TOKEN - 1]}…"


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def indented(text: str) -> str:
    """
    A text as a paragraph of its own.

    Args:
        text (`str`): the text.

    Returns:
        `str`: printable, with its own lines, each after four spaces.
    """
    lines = ("".join(c if c.isprintable() else _escaped(c) for c in line) for line in text.split("\n"))
    return "\n".join(f"    {line}".rstrip() for line in lines)


def _format_block(
    record: Mapping[str, Any], number: int, decode: Callable[[int], str], color: bool, width: int
) -> str:
    block = BlockTrajectory.of(record, number)
    heading = f"Block {number}, {block.span} of the response: {block.describe()}"
    return "\n".join([heading, _format_states(block, decode, color, width)])


def _format_states(block: BlockTrajectory, decode: Callable[[int], str], color: bool, width: int) -> str:
    """The states, a line each; in several parts, one below the other, if they are too wide."""
    texts = visible_tokens([block], decode)
    parts = _split_columns([[texts[token] for token in state] for state in block.states], color, width)
    return "\n\n".join(
        format_trajectory([state[first:last] for state in block.states], texts.__getitem__, color)
        for first, last in parts
    )


def _beside(left: list[str], right: list[str]) -> list[str]:
    """Two pieces of text, line by line, side by side."""
    width = max(map(plain_width, left))
    rows = zip_longest(left, right, fillvalue="")
    return [f"{a}{' ' * (width - plain_width(a) + _GAP)}{b}".rstrip() for a, b in rows]


def _split_columns(texts: list[list[str]], color: bool, width: int) -> list[tuple[int, int]]:
    """First and last column of as few parts as fit the width, of about the same number of columns."""
    # As `format_trajectory` sets them: a space between columns, and without color two more for brackets.
    widths = [max(map(display_width, column)) + (1 if color else 3) for column in zip(*texts)]
    num_columns = len(widths)
    for num_parts in range(1, num_columns + 1):
        edges = [round(num_columns * part / num_parts) for part in range(num_parts + 1)]
        parts = list(zip(edges, edges[1:]))
        if all(sum(widths[first:last]) + _MARGIN - 1 <= width for first, last in parts):
            return parts
    return [(column, column + 1) for column in range(num_columns)]
