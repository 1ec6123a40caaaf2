"""Trajectories in a terminal: a record, or blocks side by side. Right tokens are blue, wrong ones red."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from ..trajectories.schema import check_names
from ..trajectories.statistics import TrajectoryStatistics, measure_trajectories


_LONGEST_TOKEN = 20
_MARGIN = 4  # columns of the number of a state
_GAP = 4  # columns between two blocks
_UNLIMITED = 10**6  # columns: blocks are split here, so that no cell is cut or wrapped


@dataclass(frozen=True)
class BlockTrajectory:
    """The states of a block, from the first draft to the fixed point, without padding after the response."""

    states: list[list[int]]  # each as long as the block is in its response
    number: int = 0  # of the block in its response, from 0
    start: int = 0  # place of its first token in the response, from 0
    is_trajectory: bool = True  # not if the single state is the response's own tokens, where it is not greedy
    name: str = ""  # what it is called in a picture, such as the name of the model

    @classmethod
    def of(cls, record: Mapping[str, Any], number: int, name: str = "") -> BlockTrajectory:
        """Take a block out of a record, counted from 0; without `is_greedy` the record is taken as greedy."""
        states = record["states"][number]
        start = number * len(states[0])
        length = min(len(states[0]), len(record["response_ids"]) - start)
        is_trajectory = record.get("is_greedy") is not False or len(states) > 1
        return cls([list(state[:length]) for state in states], number, start, is_trajectory, name)

    @property
    def span(self) -> str:
        """Which tokens of the response it holds, counted from 0, such as `"tokens 16 to 31"`."""
        last = self.start + len(self.states[-1]) - 1
        return f"tokens {self.start} to {last}" if last > self.start else f"token {self.start}"

    @property
    def num_iterations(self) -> int:
        """Iterations to converge, the confirming one not counted."""
        return len(self.states) - 1

    @property
    def statistics(self) -> TrajectoryStatistics:
        """What `measure_trajectories` counts on it."""
        return measure_trajectories([{"response_ids": self.states[-1], "states": [self.states]}])

    @property
    def wrong(self) -> list[list[bool]]:
        """Of each token of each state, whether it is another one than at the fixed point."""
        return [[token != right for token, right in zip(state, self.states[-1])] for state in self.states]

    def describe(self) -> str:
        """Say how it converges, such as `"3 iterations to converge, 9 fast-forwarded, 4 stationary"`."""
        if not self.is_trajectory:
            return "its own tokens, where it is not greedy"
        figures = self.statistics
        noun = "iteration" if self.num_iterations == 1 else "iterations"
        return (
            f"{self.num_iterations} {noun} to converge, {figures.mean_fast_forwarded:.0f} fast-forwarded, "
            f"{figures.mean_stationary:.0f} stationary"
        )


def format_record(
    record: Mapping[str, Any],
    decode: Callable[[int], str],
    color: bool = True,
    blocks: Sequence[int] | None = None,
    width: int | None = None,
) -> str:
    """
    Draw a trajectory record: its prompt, its response, and the states of its blocks, a line each; of one without
    states the tokens of both instead.

    `blocks` are the numbers of those to draw, by default all. Padding after the end of the response is left out, and
    blocks wider than the terminal are drawn in several parts, one below the other.
    """
    if "states" not in record:
        return _format_response(record, decode, blocks)
    states = record["states"]
    numbers = range(len(states)) if blocks is None else blocks
    outside = [number for number in numbers if not 0 <= number < len(states)]
    if outside:
        raise ValueError(f"`blocks` must be from 0 to {len(states) - 1}, got {outside[0]}. Choose one of those.")
    greedy = "" if record.get("is_greedy") is not False else ", not all of it greedy"
    parts = _head(record, greedy)
    for number in numbers:
        block = BlockTrajectory.of(record, number)
        drawn = _render(_draw_states(block, decode, color, width or terminal_width()), color)
        parts.append(f"Block {number}, {block.span} of the response: {block.describe()}\n{drawn}")
    return "\n\n".join(parts)


def _head(record: Mapping[str, Any], note: str) -> list[str]:
    """The paragraphs of a record before its states; `note` ends the first one."""
    return [
        f"`data_id` {record.get('data_id', '?')}: a prompt of {len(record['prompt_ids'])} tokens, a response of "
        f"{len(record['response_ids'])} tokens{note}",
        f"Prompt:\n{indented(record.get('prompt', ''))}",
        f"Response:\n{indented(record.get('response', ''))}",
    ]


def _format_response(record: Mapping[str, Any], decode: Callable[[int], str], blocks: Sequence[int] | None) -> str:
    """A record without states: its text, and its tokens as ids and text."""
    if blocks is not None:
        check_names(record)
    parts = _head(record, ", no states (it is of a dataset of responses alone)")
    for name in ("prompt_ids", "response_ids"):
        tokens = " ".join(f"{token}:{visible_token(decode(token))}" for token in record[name])
        parts.append(f"`{name}`:\n{indented(tokens)}")
    return "\n\n".join(parts)


def format_blocks(
    blocks: Sequence[BlockTrajectory], decode: Callable[[int], str], color: bool = True, width: int | None = None
) -> str:
    """
    Draw the trajectories of blocks, each under its name and what was counted on it.

    They stand side by side if the terminal is wide enough, otherwise one below the other.
    """
    width = width or terminal_width()
    beside = Table.grid(padding=(0, _GAP, 0, 0))
    beside.add_row(*(_headed(block, _draw_states(block, decode, color, _UNLIMITED)) for block in blocks))
    if _width_of(beside) <= width:
        return _render(beside, color)
    below = [_headed(block, _draw_states(block, decode, color, width)) for block in blocks]
    return "\n\n".join(_render(block, color) for block in below)


def _headed(block: BlockTrajectory, states: Text) -> Text:
    return Text("\n").join([*(Text(line) for line in (block.name, block.describe()) if line), states])


def _draw_states(block: BlockTrajectory, decode: Callable[[int], str], color: bool, width: int) -> Text:
    """The states, a line each; in as few parts of about the same number of columns as fit the width."""
    texts = visible_tokens([block], decode)
    columns = [
        _draw_column([(texts[state[place]], wrong[place]) for state, wrong in zip(block.states, block.wrong)], color)
        for place in range(len(block.states[-1]))
    ]
    for num_parts in range(1, len(columns) + 1):
        edges = [round(len(columns) * part / num_parts) for part in range(num_parts + 1)]
        parts = [columns[first:last] for first, last in zip(edges, edges[1:])]
        if all(_MARGIN + sum(column[0].cell_len + 1 for column in part) <= width for part in parts):
            break
    return Text("\n\n").join(map(_draw_lines, parts))


def _draw_column(cells: Sequence[tuple[str, bool]], color: bool) -> list[Text]:
    """Cells of one width, for the text of each token and whether it is wrong."""
    if color:
        column = [Text(text, style="red" if is_wrong else "blue") for text, is_wrong in cells]
    else:
        column = [Text(f"[{text}]" if is_wrong else f"{text}  ") for text, is_wrong in cells]
    width = max(cell.cell_len for cell in column)
    for cell in column:
        cell.align("left", width)
    return column


def _draw_lines(columns: Sequence[Sequence[Text]]) -> Text:
    lines = [Text(" ").join([Text(f"{number:3d} "), *cells]) for number, cells in enumerate(zip(*columns))]
    return Text("\n").join(lines)


def _console(color: bool) -> Console:
    """One that is the same everywhere, also in a notebook and where the output is no terminal."""
    return Console(
        width=_UNLIMITED,
        height=100,
        color_system="standard" if color else None,
        force_terminal=color,
        force_jupyter=False,
        legacy_windows=False,
        no_color=not color,
    )


def _width_of(drawn: RenderableType) -> int:
    console = _console(color=False)
    return Measurement.get(console, console.options, drawn).maximum


def _render(drawn: RenderableType, color: bool) -> str:
    console = _console(color)
    with console.capture() as capture:
        console.print(drawn)
    return "\n".join(line.rstrip() for line in capture.get().split("\n")).rstrip("\n")


def visible_tokens(blocks: Iterable[BlockTrajectory], decode: Callable[[int], str]) -> dict[int, str]:
    """The texts of all tokens of some blocks, by token, as `visible_token` makes them."""
    tokens = sorted({token for block in blocks for state in block.states for token in state})
    return {token: visible_token(decode(token)) for token in tokens}


def visible_token(text: str) -> str:
    """
    The text of a token for a table: what is not printable is escaped, long texts are cut, nothing but spaces shows as
    that many `␣`, and an empty text as `''`.
    """
    text = _escaped(text)
    if not text.strip(" "):
        text = "␣" * len(text) or "''"
    return text if len(text) <= _LONGEST_TOKEN else f"{text[: _LONGEST_TOKEN - 1]}…"


def indented(text: str) -> str:
    """A text as a paragraph of its own: printable, with its own lines, each after four spaces."""
    return "\n".join(f"    {_escaped(line)}".rstrip() for line in text.split("\n"))


def _escaped(text: str) -> str:
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape", "surrogatepass").decode("ascii")
        for character in text
    )


def terminal_width() -> int:
    """Columns of the present terminal; 120 where there is none."""
    return shutil.get_terminal_size(fallback=(120, 24)).columns
