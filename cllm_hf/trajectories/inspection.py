"""Looking at a trajectory record in a terminal."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..evaluation.report import display_width, format_trajectory
from .statistics import measure_trajectories


_LONGEST_TOKEN = 20
_MARGIN = 5  # columns of the number of a state


def format_record(
    record: Mapping[str, Any],
    decode: Callable[[int], str],
    color: bool = True,
    blocks: Sequence[int] | None = None,
    width: int | None = None,
) -> str:
    """
    Draw a trajectory record: its prompt, its response, and the states of its blocks, a line each.

    Tokens that are right are blue, wrong ones red; without color wrong ones stand in brackets. Padding behind the end
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
        width = shutil.get_terminal_size(fallback=(120, 24)).columns
    states = record["states"]
    numbers = list(range(len(states)) if blocks is None else blocks)
    outside = [number for number in numbers if not 0 <= number < len(states)]
    if outside:
        raise ValueError(f"`blocks` must be from 0 to {len(states) - 1}, got {outside[0]}. Choose one of those.")
    greedy = "" if record.get("is_greedy") is not False else ", not all of it greedy"
    parts = [
        f"`data_id` {record.get('data_id', '?')}: a prompt of {len(record['prompt_ids'])} tokens, a response of "
        f"{len(record['response_ids'])} tokens{greedy}",
        f"Prompt:\n{_indented(record.get('prompt', ''))}",
        f"Response:\n{_indented(record.get('response', ''))}",
        *(_format_block(record, number, decode, color, width) for number in numbers),
    ]
    return "\n\n".join(parts)


def visible_token(text: str) -> str:
    """
    The text of a token for a table: what is not printable is escaped, long texts are cut, and none shows as `''`.

    Args:
        text (`str`): its text.

    Returns:
        `str`: a line without tabs and control characters.
    """
    text = "".join(character if character.isprintable() else _escaped(character) for character in text)
    if not text:
        return "''"
    return text if len(text) <= _LONGEST_TOKEN else f"{text[: _LONGEST_TOKEN - 1]}…"


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def _indented(text: str) -> str:
    """Printable, with its own lines."""
    lines = ("".join(c if c.isprintable() else _escaped(c) for c in line) for line in text.split("\n"))
    return "\n".join(f"    {line}".rstrip() for line in lines)


def _format_block(
    record: Mapping[str, Any], number: int, decode: Callable[[int], str], color: bool, width: int
) -> str:
    states = record["states"][number]
    start = number * len(states[0])
    tokens = list(record["response_ids"][start : start + len(states[0])])
    length = len(tokens)
    span = f"tokens {start} to {start + length - 1}" if length > 1 else f"token {start}"
    where = f"Block {number}, {span} of the response"
    if record.get("is_greedy") is False and len(states) == 1:
        heading = f"{where}: its own tokens, where it is not greedy"
    else:
        figures = measure_trajectories([{"response_ids": tokens, "states": [states]}])
        heading = (
            f"{where}: {_count(len(states) - 1, 'iteration')} to converge, {figures.mean_fast_forwarded:.0f} "
            f"fast-forwarded, {figures.mean_stationary:.0f} stationary"
        )
    texts = {token: visible_token(decode(token)) for state in states for token in state[:length]}
    parts = _split_columns([[texts[token] for token in state[:length]] for state in states], color, width)
    drawn = [
        format_trajectory([state[first:last] for state in states], texts.__getitem__, color) for first, last in parts
    ]
    return "\n".join([heading, "\n\n".join(drawn)])


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


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
