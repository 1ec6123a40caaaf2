"""How fast blocks converge: what a trajectory dataset says about the model that made it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from ..blocks.rules import count_leading
from ..cards import format_table
from ..files import check_writable_file, save_figure
from ..options import check_block_size
from .schema import RecordArrays, lay_out, piece_starts


# Counters of `TrajectoryStatistics`, and what they count.
_TITLES = {
    "iterations": "Iterations to converge a block",
    "fast_forwarded": "Fast-forwarded tokens of a block",
    "stationary": "Stationary tokens of a block",
}
_COUNTERS = tuple(_TITLES)
_SUMS = ("num_records", "num_tokens", "num_left_out_blocks", "num_left_out_tokens")
# Rows of the table.
_SIZES = (("responses", "num_records"), ("tokens", "num_tokens"), ("blocks", "num_blocks"))
_MEANS = (
    ("iterations to converge a block", "mean_iterations"),
    ("tokens per iteration", "tokens_per_iteration"),
    ("fast-forwarded tokens a block", "mean_fast_forwarded"),
    ("stationary tokens a block", "mean_stationary"),
)
_MOST_BARS, _MOST_STAIRS, _BAR_WIDTH = 20, 64, 60
# Told apart also by those who are color-blind.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")


@dataclass(frozen=True)
class TrajectoryStatistics:
    """
    Iterations, fast-forwarded and stationary tokens of the blocks of a dataset (CLLM, arXiv 2403.00835, section 3).

    These are sums and counts only, so that those of two shards can be added. Let `s_0 .. s_k` be a block's states,
    `s_k` its fixed point, and `p_j` the number of leading right tokens of `s_j`, all within the response. Then the
    block takes `k` iterations, its iteration `j` fast-forwards `max(p_{j+1} - p_j - 1, 0)` tokens, and a position is a
    stationary token if some state has it right after a wrong token, and all later states have it right too.

    Attributes:
        block_size (`int`): tokens of a block.
        num_records (`int`): responses.
        num_tokens (`int`): tokens of the responses.
        num_left_out_blocks (`int`): blocks with a single state in responses that are not greedy. Such a state is the
            response's own tokens, no trajectory; these blocks are in none of the counts below.
        num_left_out_tokens (`int`): tokens of those blocks.
        iterations (`collections.Counter`): number of blocks by iterations to converge, the confirming one not counted.
        fast_forwarded (`collections.Counter`): number of blocks by tokens fast-forwarded in all their iterations.
        stationary (`collections.Counter`): number of blocks by their stationary tokens.

    Raises:
        ValueError: for a block size below 1, negative numbers, or counters of different numbers of blocks.
    """

    block_size: int
    num_records: int = 0
    num_tokens: int = 0
    num_left_out_blocks: int = 0
    num_left_out_tokens: int = 0
    iterations: Mapping[int, int] = field(default_factory=Counter)
    fast_forwarded: Mapping[int, int] = field(default_factory=Counter)
    stationary: Mapping[int, int] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        check_block_size(self.block_size, "block_size")
        for name in _SUMS:
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must be at least 0, got {getattr(self, name)}. Measure the dataset again.")
        for name in _COUNTERS:
            counter = Counter(getattr(self, name))
            if any(number < 0 or value < 0 for value, number in counter.items()):
                raise ValueError(f"`{name}` must map numbers of at least 0 to such numbers, got {dict(counter)}.")
            object.__setattr__(self, name, counter)
        totals = {name: sum(getattr(self, name).values()) for name in _COUNTERS}
        if len(set(totals.values())) > 1:
            raise ValueError(
                "`iterations`, `fast_forwarded` and `stationary` must count the same number of blocks, got "
                f"{', '.join(map(str, totals.values()))}. Measure the dataset again."
            )

    def __add__(self, other: object) -> TrajectoryStatistics:
        """Add the statistics of two parts of a dataset, which have one block size."""
        if not isinstance(other, TrajectoryStatistics):
            return NotImplemented
        _check_comparable([self, other])
        added = {name: getattr(self, name) + getattr(other, name) for name in (*_SUMS, *_COUNTERS)}
        return TrajectoryStatistics(self.block_size, **added)

    @property
    def num_blocks(self) -> int:
        """Blocks that have a trajectory."""
        return sum(self.iterations.values())

    @property
    def mean_iterations(self) -> float:
        """Iterations to converge, a block; `nan` without blocks."""
        return _mean(self.iterations)

    @property
    def mean_fast_forwarded(self) -> float:
        """Fast-forwarded tokens, a block; `nan` without blocks."""
        return _mean(self.fast_forwarded)

    @property
    def mean_stationary(self) -> float:
        """Stationary tokens, a block; `nan` without blocks."""
        return _mean(self.stationary)

    @property
    def tokens_per_iteration(self) -> float:
        """
        Tokens of all trajectories over the iterations that they take; `nan` without iterations.

        Tokens that the first draft had right count, as they do in decoding. The prefill and confirming iterations are
        left out, so that tokens per forward pass in decoding is another figure.
        """
        total = sum(value * number for value, number in self.iterations.items())
        return (self.num_tokens - self.num_left_out_tokens) / total if total else math.nan

    def to_dict(self) -> dict[str, Any]:
        """
        Turn into what JSON can hold, in an order that does not depend on how it was counted.

        Returns:
            `dict`: the attributes; values of counters are texts, as keys of JSON are.
        """
        sums = {name: int(getattr(self, name)) for name in ("block_size", *_SUMS)}
        counters = {
            name: {str(value): number for value, number in sorted(getattr(self, name).items()) if number}
            for name in _COUNTERS
        }
        return {**sums, **counters}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrajectoryStatistics:
        """
        Read what `to_dict` gave.

        Args:
            values (`Mapping[str, Any]`): all attributes.

        Returns:
            `TrajectoryStatistics`.

        Raises:
            ValueError: for missing or unknown names, or values that the class refuses.
        """
        names = ("block_size", *_SUMS, *_COUNTERS)
        if set(values) != set(names):
            raise ValueError(
                f"Statistics of trajectories have the entries {', '.join(names)}, got {', '.join(values) or 'none'}. "
                "Pass what `to_dict` gave, or measure the dataset again."
            )
        try:
            counters = {name: {int(value): number for value, number in values[name].items()} for name in _COUNTERS}
            return cls(**{**values, **counters})
        except (AttributeError, TypeError) as error:
            raise ValueError(f"Statistics are numbers and counters, got {values!r:.200}. Measure again.") from error


def measure_trajectories(
    records: Iterable[Mapping[str, Any]] | Dataset, block_size: int | None = None
) -> TrajectoryStatistics:
    """
    Count iterations, fast-forwarded and stationary tokens of all blocks.

    Args:
        records (`Iterable[Mapping]` or `datasets.Dataset`): trajectory records. Without a column `is_greedy` all are
            taken as greedy. Of a dataset only the columns that are needed are read, some hundred rows at a time.
        block_size (`int`, *optional*): what every state must have; by default what the first ones have.

    Returns:
        `TrajectoryStatistics`.

    Raises:
        ValueError: if there are no records and no `block_size`, a column is missing, or the states of a record are not
            of the block size or do not cover its response.
    """
    total = None if block_size is None else TrajectoryStatistics(block_size)
    for found_size, arrays in lay_out(records, block_size):
        measured = _measure(arrays, found_size)
        total = measured if total is None else total + measured
    if total is None:
        raise ValueError("There are no trajectories to measure, got no records. Pass some, or a `block_size`.")
    return total


def _measure(arrays: RecordArrays, block_size: int) -> TrajectoryStatistics:
    lengths = arrays.block_lengths(block_size)
    figures = _count_by_block(arrays.tokens.reshape(-1, block_size), arrays.num_states, lengths)
    is_trajectory = arrays.is_greedy[arrays.record_of_block] | (arrays.num_states > 1)
    counters = {name: _count(figure[is_trajectory]) for name, figure in zip(_COUNTERS, figures)}
    return TrajectoryStatistics(
        block_size,
        num_records=len(arrays.num_blocks),
        num_tokens=int(arrays.response_lengths.sum()),
        num_left_out_blocks=int((~is_trajectory).sum()),
        num_left_out_tokens=int(lengths[~is_trajectory].sum()),
        **counters,
    )


def _count_by_block(
    states: np.ndarray, num_states: np.ndarray, block_lengths: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    Iterations, fast-forwarded and stationary tokens of each block, as `TrajectoryStatistics` defines them.

    Args:
        states (`numpy.ndarray` of shape `(total_states, block_size)`): states of all blocks, one after another.
        num_states (`numpy.ndarray` of shape `(num_blocks,)`): states of each block, at least one.
        block_lengths (`numpy.ndarray` of shape `(num_blocks,)`): tokens of each block that lie in its response; what
            stands after is padding and counts as right.
    """
    if not len(num_states):
        return num_states, num_states, num_states
    total_states, block_size = states.shape
    starts, ends = piece_starts(num_states), np.cumsum(num_states) - 1
    block = np.repeat(np.arange(len(num_states)), num_states)
    # States are numbered from 1 within their block, so that 0 can stand for none.
    number = (np.arange(total_states) - starts[block] + 1)[:, None]
    positions = np.arange(block_size)
    wrong = (states != states[ends[block]]) & (positions < block_lengths[block][:, None])
    leading = count_leading(torch.from_numpy(~wrong)).numpy().clip(max=block_lengths[block])

    gained = np.diff(leading, append=0) - 1
    gained[ends] = 0  # after a fixed point stands another block
    fast_forwarded = np.add.reduceat(np.maximum(gained, 0), starts)

    # From the state after the last in which it is wrong, a token is right for good. It is stationary if something
    # before it is still wrong in that state or a later one.
    last_wrong = np.maximum.reduceat(np.where(wrong, number, 0), starts)
    last_behind_wrong = np.maximum.reduceat(np.where(leading[:, None] < positions, number, 0), starts)
    is_stationary = (last_behind_wrong > last_wrong) & (positions < block_lengths[:, None])
    return num_states - 1, fast_forwarded, is_stationary.sum(1)


def format_statistics(named: Mapping[str, TrajectoryStatistics]) -> str:
    """
    A Markdown table of the means of one or more datasets, by the titles of their columns; with two of them the ratio
    of the second to the first stands in a further column.
    """
    _check_comparable(named.values())
    columns = list(named.values())
    rows = [(title, *(f"{getattr(one, name):,}" for one in columns)) for title, name in _SIZES]
    rows += [(title, *(_decimals(getattr(one, name)) for one in columns)) for title, name in _MEANS]
    header = [f"block size {columns[0].block_size}", *named]
    if len(named) == 2:
        before, after = columns
        ratios = [_ratio(getattr(after, name), getattr(before, name)) for _, name in _MEANS]
        header.append(" / ".join(reversed(header[1:])))
        rows = [(*row, ratio) for row, ratio in zip(rows, [""] * len(_SIZES) + ratios)]
    return format_table(header, rows)


def format_histogram(statistics: TrajectoryStatistics) -> str:
    """
    Draw how many blocks take how many iterations, and have how many fast-forwarded and stationary tokens, as lines of
    at most 100 columns. The longest bar of a histogram is its most frequent value.
    """
    if not statistics.num_blocks:
        raise ValueError("A histogram needs at least one block with a trajectory, got none. Build from more prompts.")
    parts = []
    for name, title in _TITLES.items():
        counter = getattr(statistics, name)
        lines = [f"{title} (mean {_mean(counter):.2f}, {statistics.num_blocks:,} blocks)"]
        edges = _edges([counter], _MOST_BARS)
        counts = _heights(counter, edges)
        labels = [str(low) if high == low + 1 else f"{low}-{high - 1}" for low, high in zip(edges, edges[1:])]
        width, digits = max(map(len, labels)), len(f"{max(counts):,}")
        first = next(number for number, count in enumerate(counts) if count)
        for label, count in list(zip(labels, counts))[first:]:
            figures = f"{count:{digits},} {count / statistics.num_blocks:6.1%}"
            lines.append(f"{label:>{width}} {figures} {_bar(count / max(counts), _BAR_WIDTH)}".rstrip())
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def plot_statistics(named: Mapping[str, TrajectoryStatistics], path: Path) -> None:
    """
    Plot the shares of blocks by iterations to converge, fast-forwarded and stationary tokens, one panel each, into a
    PNG file. Statistics are drawn over each other, and the same ones give the same bytes.
    """
    from matplotlib import style
    from matplotlib.figure import Figure

    _check_comparable(named.values())
    check_writable_file(path)
    with style.context("default"):  # whatever the user has set for plots of their own
        figure = Figure(figsize=(12, 4), dpi=150, layout="constrained")
        block_size = next(iter(named.values())).block_size
        figure.suptitle(f"How blocks of {block_size} tokens converge", fontsize=12)
        panels = figure.subplots(1, len(_TITLES), squeeze=False)[0]
        for axes, (name, title) in zip(panels, _TITLES.items()):
            _draw_panel(axes, title, {label: getattr(one, name) for label, one in named.items()})
        panels[0].set_ylabel("share of blocks")
        save_figure(figure, path)


def _draw_panel(axes: Any, title: str, counters: Mapping[str, Mapping[int, int]]) -> None:
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    edges = _edges(counters.values(), _MOST_STAIRS)
    shifted = [edge - 0.5 for edge in edges]  # so that a bar stands over its value
    handles = []
    for number, (label, counter) in enumerate(counters.items()):
        color = _COLORS[number % len(_COLORS)]
        blocks = sum(counter.values())
        shares = [height / max(blocks, 1) for height in _heights(counter, edges)]
        axes.stairs(shares, shifted, fill=True, color=color, alpha=0.35, linewidth=0)
        axes.stairs(shares, shifted, color=color, linewidth=1.3)
        if blocks:
            axes.axvline(_mean(counter), color=color, linestyle="--", linewidth=1.2)
        text = f"{label}, mean {_mean(counter):.2f}" if blocks else f"{label}, no blocks"
        # A dollar sign would begin a formula.
        handles.append(Patch(facecolor=(color, 0.35), edgecolor=color, label=text.replace("$", r"\$")))
    axes.set_xlabel(title.lower() + (f" (bars of {edges[1]})" if edges[1] > 1 else ""))
    axes.set_xlim(shifted[0] - 0.2, shifted[-1] + 0.2)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}%")
    axes.spines[["top", "right"]].set_visible(False)
    # Above the panel, where it covers nothing.
    axes.legend(handles=handles, frameon=False, fontsize=9, loc="lower left", bbox_to_anchor=(0, 1))


def _edges(counters: Iterable[Mapping[int, int]], most: int) -> list[int]:
    """Edges of at most so many bars of equal width, from 0 to beyond the largest value."""
    largest = max((value for counter in counters for value in counter), default=0)
    width = -(-(largest + 1) // most)
    return list(range(0, largest + width + 1, width))


def _heights(counter: Mapping[int, int], edges: list[int]) -> list[int]:
    """Blocks between each two edges."""
    return np.histogram(list(counter), edges, weights=list(counter.values()))[0].tolist()


def _bar(share: float, width: int) -> str:
    """A bar of a share of a width, in eighths of a column; a share above 0 shows."""
    eighths = max(round(share * width * 8), 1) if share else 0
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def _decimals(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"


def _ratio(after: float, before: float) -> str:
    return f"{after / before:.2f}x" if before > 0 and not math.isnan(after) else "-"


def _count(values: np.ndarray) -> Counter[int]:
    return Counter(dict(zip(*(array.tolist() for array in np.unique(values, return_counts=True)))))


def _mean(counter: Mapping[int, int]) -> float:
    blocks = sum(counter.values())
    return sum(value * number for value, number in counter.items()) / blocks if blocks else math.nan


def _check_comparable(statistics: Collection[TrajectoryStatistics]) -> None:
    if not statistics:
        raise ValueError("There are no statistics to show, got an empty mapping. Pass those of at least one dataset.")
    sizes = sorted({one.block_size for one in statistics})
    if len(sizes) > 1:
        raise ValueError(
            f"Statistics of different block sizes cannot be added or compared, got `block_size` {sizes}. Build both "
            "datasets with the same `block_size`."
        )
