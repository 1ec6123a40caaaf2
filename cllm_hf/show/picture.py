"""How a block of one or several models converges: decoded, and drawn as PNG or for a terminal."""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.cells import cell_len
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..files import check_writable_file, write_whole
from ..options import as_integer
from ..trajectories.builder import TrajectoryBuilder
from ..trajectories.options import KEEP_ALL
from ..trajectories.prompts import Prompt
from .terminal import BlockTrajectory, format_blocks, indented, visible_tokens


# Told apart also by those who are color-blind: face, text and corner of a cell. The corner tells them apart in gray.
_RIGHT, _WRONG = ("#D6E8F6", "#00497F"), ("#FBD9CC", "#A61E00")
_CORNER, _GRAY = "#D53A00", "#606060"
# A character that the first one lacks is taken from the next, Chinese ones from what the machine has.
_FONTS = ("DejaVu Sans Mono", "DejaVu Sans")
_SYSTEM_FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Source Han Sans SC",
    "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei",
    "Hiragino Sans GB",
    "PingFang SC",
    "Microsoft YaHei",
    "Arial Unicode MS",
    "Noto Emoji",
    "Noto Sans Symbols 2",
)
# Lengths are in points, of which 72 are an inch.
_DPI = 150
_FONT_SIZE, _CHARACTER, _ROW, _PADDING = 7.5, 4.55, 15.0, 4.0
_LINE, _MARGIN, _GAP, _NUMBERS = 13.0, 10.0, 26.0, 22.0
_LEAST_WIDTH = 450.0  # that of the legend
_WIDEST_PAIR = 1400.0  # beyond, blocks stand one below the other
_MOST_CELLS = 5000  # of a block; beyond, cells are too many for their texts
_LONGEST_SIDE = 1000.0  # of a block whose cells have no texts


@dataclass(frozen=True)
class TrajectoryPicture:
    """
    How a block converges, as `draw_trajectories` found it. A notebook shows it as a picture, `print` as text.

    Attributes:
        prompt (`str`): what the models have answered.
        blocks (`Sequence[BlockTrajectory]`): the block of each model, by its `name`.
        decode (`Callable[[int], str]`): gives the text of a token.
    """

    prompt: str
    blocks: Sequence[BlockTrajectory]
    decode: Callable[[int], str]

    @property
    def title(self) -> str:
        """Which block it is, and which tokens of the response; both counted from 0, as in a record."""
        block = max(self.blocks, key=lambda block: len(block.states[-1]))
        return f"Block {block.number}, {block.span} of the response"

    def format(self, color: bool = True, width: int | None = None) -> str:
        """
        Draw it for a terminal.

        Args:
            color (`bool`): whether right tokens are blue and wrong ones red; otherwise wrong ones stand in brackets.
            width (`int`, *optional*): columns of the terminal; by default those of the present one.

        Returns:
            `str`.
        """
        how = "blue, wrong ones red" if color else "bare, wrong ones in brackets"
        return "\n\n".join(
            [
                f"Prompt:\n{indented(self.prompt)}",
                f"{self.title}. A line a state, from the first draft to the fixed point; right tokens are {how}.",
                format_blocks(self.blocks, self.decode, color, width),
            ]
        )

    def __str__(self) -> str:
        return self.format(color=False)

    def to_png(self) -> bytes:
        """
        Draw it as a PNG file: a row a state, a cell a token. Cells of right tokens are blue; those of wrong ones are
        red with a corner, which is there in gray too. Characters that no font of this machine has are drawn as boxes.

        Returns:
            `bytes`: the same picture gives the same bytes with the same fonts.
        """
        return draw_blocks(self.blocks, self.decode, self.title, f"Prompt: {self.prompt}")

    _repr_png_ = to_png

    def save(self, path: str | Path) -> None:
        """
        Write it into a PNG file.

        Args:
            path (`str` or `pathlib.Path`): the file.

        Raises:
            OSError: if it cannot be written.
        """
        path = Path(path)
        check_writable_file(path)
        write_whole(path, self.to_png())


def draw_trajectories(
    models: Mapping[str, PreTrainedModel],
    processing_class: PreTrainedTokenizerBase,
    prompt: Prompt,
    block_size: int = 16,
    block: int = 0,
    max_new_tokens: int | None = None,
    seed: int = 0,
) -> TrajectoryPicture:
    """
    Decode a prompt by Jacobi with several models, such as a target model and the CLLM made from it, and draw how one
    block of each converges (CLLM, arXiv 2403.00835, figure 1).

    Trajectories are those of `TrajectoryBuilder`: they begin with the same draft, and the context of a block is the
    model's own response before it. So right tokens are those of the model's own fixed point.

    Args:
        models (`Mapping[str, transformers.PreTrainedModel]`): by their names in the picture, in its order, such as
            `{"target model": .., "CLLM": ..}`.
        processing_class (`transformers.PreTrainedTokenizerBase`): their tokenizer.
        prompt (`str`, `list[dict]` or `list[int]`): text, chat messages or token ids.
        block_size (`int`): tokens of a block.
        block (`int`): number of the block in the response, from 0.
        max_new_tokens (`int`, *optional*): longest response, in tokens; by default it ends with the block.
        seed (`int`): of the first draft.

    Returns:
        `TrajectoryPicture`: `picture.save("file.png")`, `print(picture)`, or the last value of a cell of a notebook.

    Raises:
        ValueError: if there is no model, for an option out of range, an empty or too long prompt, a response that has
            fewer blocks or is not greedy in this one, or a model whose blocks cannot be packed.
    """
    if not models:
        raise ValueError("`models` must hold at least one model, got none.")
    found = [
        collect_block(model, processing_class, prompt, name, block_size, block, max_new_tokens, seed)
        for name, model in models.items()
    ]
    return TrajectoryPicture(found[0][0], [one for _, one in found], token_decoder(processing_class))


def collect_block(
    model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    prompt: Prompt,
    name: str,
    block_size: int = 16,
    block: int = 0,
    max_new_tokens: int | None = None,
    seed: int = 0,
) -> tuple[str, BlockTrajectory]:
    """The text of a prompt, and one block of its response; see `draw_trajectories`."""
    number = as_integer(block)
    if number is None or number < 0:
        raise ValueError(f"`block` must be an integer of at least 0, got {block!r}.")
    longest = (number + 1) * block_size if max_new_tokens is None else max_new_tokens
    # Whatever the model says is kept.
    builder = TrajectoryBuilder(
        model, processing_class, block_size, longest, seed, cleaning=KEEP_ALL, not_greedy="keep", show_progress=False
    )
    try:
        record: dict[str, Any] = builder.build([prompt])[0]
    except ValueError as error:
        if builder.counts["empty_prompt"]:
            raise ValueError("`prompt` must have at least one token, got none. Write one.") from error
        if builder.counts["long_prompt"]:
            raise ValueError(
                f"`prompt` and {longest} tokens of a response must fit into the positions of the model, got too many "
                f"for {name}. Choose an earlier block, or a shorter prompt."
            ) from error
        raise
    blocks = len(record["states"])
    if block >= blocks:
        ends = "" if max_new_tokens is None else f" of at most {max_new_tokens} tokens"
        raise ValueError(
            f"`block` must be from 0 to {blocks - 1}, the blocks of the response of {name}{ends}, got {block}. Choose "
            "one of those."
        )
    found = BlockTrajectory.of(record, block, name)
    if not found.is_trajectory:
        raise ValueError(
            f"Block {block} of the response of {name} has no trajectory: two tokens there are equally good but for "
            "rounding. Choose another block, or load the model in float32."
        )
    return record["prompt"], found


def token_decoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[int], str]:
    """What gives the text of a token."""
    return lambda token: str(tokenizer.decode([token]))


@dataclass(frozen=True)
class _Grid:
    """Where the cells of a block lie; edges have one entry more than there are columns and rows."""

    block: BlockTrajectory
    texts: dict[int, str] | None
    lefts: list[float]
    row: float

    @classmethod
    def of(cls, block: BlockTrajectory, texts: dict[int, str]) -> _Grid:
        rows, columns = len(block.states), len(block.states[-1])
        if rows * columns > _MOST_CELLS:
            side = min(_PADDING, _LONGEST_SIDE / max(rows, columns))
            return cls(block, None, [side * column for column in range(columns + 1)], side)
        lefts = [0.0]
        for column in zip(*block.states):
            most = max(cell_len(texts[token]) for token in column)
            lefts.append(lefts[-1] + max(most, 2) * _CHARACTER + 2 * _PADDING)
        return cls(block, texts, lefts, _ROW)

    @property
    def heading(self) -> list[str]:
        """The name of the block, and what was counted on it."""
        too_many = [] if self.texts is not None else ["too many tokens for their texts"]
        return [self.block.name, ", ".join([self.block.describe(), *too_many])]

    @property
    def width(self) -> float:
        """With the numbers of the states and the heading."""
        return max(_NUMBERS + self.lefts[-1], *(cell_len(line) * 5.2 for line in self.heading))

    @property
    def height(self) -> float:
        """With the heading."""
        return len(self.heading) * _LINE + 3 + len(self.block.states) * self.row


def draw_blocks(
    blocks: Sequence[BlockTrajectory], decode: Callable[[int], str], title: str = "", caption: str = ""
) -> bytes:
    """
    Draw the trajectories of blocks as a PNG file, side by side, or one below the other if they are wide: a row a
    state, from the first draft to the fixed point, a cell a token; blocks of thousands of cells have no texts.

    The same blocks and texts give the same bytes with the same fonts.
    """
    from matplotlib import font_manager, style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    if not blocks:
        raise ValueError("There is nothing to draw, got no blocks. Pass at least one.")
    texts = visible_tokens(blocks, decode)
    grids = [_Grid.of(block, texts) for block in blocks]
    places, width, height = _arrange(grids)
    width = max(width, _LEAST_WIDTH)
    head = _head(title, caption, width)
    top = _MARGIN + len(head) * _LINE + (4 if head else 0)
    width, height = width + 2 * _MARGIN, top + height + _LINE + 12 + _MARGIN
    with style.context("default"), warnings.catch_warnings():  # whatever the user has set for plots of their own
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=(width / 72, height / 72), dpi=_DPI)
        canvas = FigureCanvasAgg(figure)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set_xlim(0, width)
        axes.set_ylim(height, 0)
        known = set(font_manager.get_font_names())
        pen = _Pen(axes, [*_FONTS, *(name for name in _SYSTEM_FONTS if name in known)])
        for number, line in enumerate(head):
            pen.write(_MARGIN, _MARGIN + number * _LINE, line, size=9 if title and not number else 8)
        for grid, (x, y) in zip(grids, places):
            _draw_grid(pen, grid, _MARGIN + x, top + y)
        _draw_legend(pen, _MARGIN, height - _MARGIN - _LINE)
        canvas.draw()
    file = io.BytesIO()
    # With a palette the file has a third of the size. One that is found by itself would lose rare colors.
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    with_palette = Image.new("P", (1, 1))
    with_palette.putpalette(_palette())
    picture = picture.quantize(palette=with_palette, dither=Image.Dither.NONE)
    picture.save(file, format="PNG", optimize=True, dpi=(_DPI, _DPI))
    return file.getvalue()


def _palette() -> list[int]:
    """What is drawn upon what, and the shades between, at most 256 colors: red, green and blue of each."""
    from matplotlib.colors import to_rgb

    pairs = [("white", "black"), ("white", _GRAY), ("white", _RIGHT[0]), ("white", _WRONG[0]), ("white", _CORNER)]
    pairs += [_RIGHT, _WRONG, (_WRONG[0], _CORNER)]
    shades = np.linspace(0, 1, 24)[:, None]
    colors = [np.array(to_rgb(a)) * (1 - shades) + np.array(to_rgb(b)) * shades for a, b in pairs]
    return np.rint(255 * np.concatenate(colors)).astype(int).flatten().tolist()


def _arrange(grids: Sequence[_Grid]) -> tuple[list[tuple[float, float]], float, float]:
    """Left and upper edge of each block, and the width and height of all."""
    widths, heights = [grid.width for grid in grids], [grid.height for grid in grids]
    gaps = _GAP * (len(grids) - 1)
    if sum(widths) + gaps <= _WIDEST_PAIR:
        lefts = [sum(widths[:number]) + _GAP * number for number in range(len(grids))]
        return [(left, 0.0) for left in lefts], sum(widths) + gaps, max(heights)
    tops = [sum(heights[:number]) + _GAP * number for number in range(len(grids))]
    return [(0.0, top) for top in tops], max(widths), sum(heights) + gaps


def _head(title: str, caption: str, width: float) -> list[str]:
    columns = max(int(width / 5.2), 20)
    lines = textwrap.wrap(" ".join(caption.split()), columns, max_lines=2, placeholder=" …") if caption else []
    return [*([title] if title else []), *lines]


@dataclass(frozen=True)
class _Pen:
    """Writes and fills on axes whose unit is a point, from the upper left corner."""

    axes: Any
    fonts: list[str]

    def write(self, x: float, y: float, text: str, size: float = _FONT_SIZE, color: str = "black", **how: Any) -> None:
        """One line, below `y`; nothing in it is a formula."""
        text = "".join(character if character.isprintable() else " " for character in text)
        self.axes.text(
            x, y + 10, text, size=size, color=color, family=self.fonts, va="baseline", parse_math=False, **how
        )

    def fill(self, shapes: list[list[tuple[float, float]]], colors: list[str] | str, edge: str = "white") -> None:
        from matplotlib.collections import PolyCollection

        if shapes:
            width = 0.8 if edge != "none" else 0
            self.axes.add_collection(PolyCollection(shapes, facecolors=colors, edgecolors=edge, linewidths=width))


def _draw_grid(pen: _Pen, grid: _Grid, left: float, top: float) -> None:
    name, counts = grid.heading
    pen.write(left, top, name, size=9, weight="bold")
    pen.write(left, top + _LINE, counts, size=8, color=_GRAY)
    left, top = left + _NUMBERS, top + 2 * _LINE + 3
    cells, colors, corners = [], [], []
    for number, (state, wrong) in enumerate(zip(grid.block.states, grid.block.wrong)):
        upper = top + number * grid.row
        for token, is_wrong, x, right in zip(state, wrong, grid.lefts, grid.lefts[1:]):
            face, ink = _WRONG if is_wrong else _RIGHT
            cells.append(_rectangle(left + x, upper, left + right, upper + grid.row))
            if grid.texts is None:
                colors.append(_CORNER if is_wrong else face)
                continue
            colors.append(face)
            if is_wrong:
                corners.append(_corner(left + right, upper))
            pen.write(left + (x + right) / 2, upper + 0.4, grid.texts[token], color=ink, ha="center")
        if grid.texts is not None:
            pen.write(left - 5, upper + 0.4, str(number), color=_GRAY, ha="right")
    pen.fill(cells, colors, edge="none" if grid.texts is None else "white")
    pen.fill(corners, _CORNER, edge="none")


def _draw_legend(pen: _Pen, left: float, top: float) -> None:
    for text, (face, _), is_wrong in (("right: as in the last row", _RIGHT, False), ("wrong", _WRONG, True)):
        pen.fill([_rectangle(left, top, left + 18, top + _LINE)], face)
        if is_wrong:
            pen.fill([_corner(left + 18, top)], _CORNER, edge="none")
        pen.write(left + 23, top - 0.5, text, size=8, color=_GRAY)
        left += 23 + len(text) * 4.9 + 16
    pen.write(left, top - 0.5, "rows: from the first draft to the fixed point", size=8, color=_GRAY)


def _rectangle(left: float, top: float, right: float, bottom: float) -> list[tuple[float, float]]:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def _corner(right: float, top: float) -> list[tuple[float, float]]:
    """A triangle in the upper right corner of a cell, within its edge."""
    return [(right - 5.4, top + 0.4), (right - 0.4, top + 0.4), (right - 0.4, top + 5.4)]
