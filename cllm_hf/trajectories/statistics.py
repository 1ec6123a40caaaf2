"""How fast blocks converge: what a trajectory dataset says about the model that made it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
from datasets import Dataset

from ..decoding.options import check_block_size
from .schema import REQUIRED_COLUMNS


_COUNTERS = ("iterations", "fast_forwarded", "stationary")
_SUMS = ("num_records", "num_tokens", "num_left_out_blocks", "num_left_out_tokens")
# Rows that are measured at once: a few MB of states.
_CHUNK = 500


@dataclass(frozen=True)
class TrajectoryStatistics:
    """
    Iterations, fast-forwarded and stationary tokens of the blocks of a dataset (CLLM, arXiv 2403.00835, section 3).

    These are sums and counts only, so that those of two shards can be added. Let `s_0 .. s_k` be the states of a block,
    `s_k` its fixed point, and `p_j` the number of leading right tokens of `s_j`, all within the response. Then the
    block takes `k` iterations, its iteration `j` fast-forwards `max(p_{j+1} - p_j - 1, 0)` tokens, and a position is a
    stationary token if some state has it right behind a wrong token, and all later states have it right too.

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
        """
        Add the statistics of two parts of a dataset.

        Args:
            other (`TrajectoryStatistics`): of the same block size.

        Returns:
            `TrajectoryStatistics`.

        Raises:
            ValueError: for different block sizes.
        """
        if not isinstance(other, TrajectoryStatistics):
            return NotImplemented
        _check_one_block_size([self, other])
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
        left out, so that tokens per forward in decoding is another figure.
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
        counters = {name: {int(value): number for value, number in values[name].items()} for name in _COUNTERS}
        return cls(**{**values, **counters})


def measure_trajectories(
    records: Iterable[Mapping[str, Any]] | Dataset, block_size: int | None = None
) -> TrajectoryStatistics:
    """
    Count iterations, fast-forwarded and stationary tokens of all blocks.

    Args:
        records (`Iterable[Mapping]` or `datasets.Dataset`): trajectory records. Without a column `is_greedy` all are
            taken as greedy. Of a dataset nothing but the columns that are needed is read, a chunk at a time.
        block_size (`int`, *optional*): what every state must have; by default what the first state has.

    Returns:
        `TrajectoryStatistics`.

    Raises:
        ValueError: if there are no records and no `block_size`, a column is missing, or the states of a record are not
            of the block size or do not cover its response.
    """
    total = TrajectoryStatistics(block_size) if block_size is not None else None
    chunks = _dataset_chunks(records) if isinstance(records, Dataset) else _record_chunks(records)
    for chunk in chunks:
        measured = _measure(chunk, total.block_size if total is not None else None)
        total = measured if total is None else total + measured
    if total is None:
        raise ValueError("There are no trajectories to measure, and no `block_size`. Pass records, or `block_size`.")
    return total


@dataclass
class _Chunk:
    """
    Records one after another: `response_lengths`, `num_blocks` and `is_greedy` have an entry a record, `num_states` an
    entry a block, `state_lengths` an entry a state, and `tokens` holds the states end to end.
    """

    response_lengths: np.ndarray
    is_greedy: np.ndarray
    num_blocks: np.ndarray
    num_states: np.ndarray
    state_lengths: np.ndarray
    tokens: np.ndarray


def _record_chunks(records: Iterable[Mapping[str, Any]]) -> Iterator[_Chunk]:
    iterator = iter(records)
    while rows := list(islice(iterator, _CHUNK)):
        for row in rows:
            _check_columns(row)
        blocks = [block for row in rows for block in row["states"]]
        states = [state for block in blocks for state in block]
        yield _Chunk(
            response_lengths=np.array([len(row["response_ids"]) for row in rows]),
            is_greedy=np.array([row.get("is_greedy") is not False for row in rows]),
            num_blocks=np.array([len(row["states"]) for row in rows]),
            num_states=np.array([len(block) for block in blocks], dtype=np.int64),
            state_lengths=np.array([len(state) for state in states], dtype=np.int64),
            tokens=np.array([token for state in states for token in state], dtype=np.int64),
        )


def _dataset_chunks(dataset: Dataset) -> Iterator[_Chunk]:
    _check_columns(dict.fromkeys(dataset.column_names))
    has_greedy = "is_greedy" in dataset.column_names
    names = ["response_ids", "states", *["is_greedy"] * has_greedy]
    for table in dataset.select_columns(names).with_format("arrow").iter(_CHUNK):
        rows, responses = (table[name].combine_chunks() for name in ("states", "response_ids"))
        blocks = rows.flatten()
        states = blocks.flatten()
        greedy = table["is_greedy"].fill_null(True).to_numpy() if has_greedy else np.ones(len(rows))
        yield _Chunk(
            response_lengths=_lengths(responses),
            is_greedy=greedy.astype(bool),
            num_blocks=_lengths(rows),
            num_states=_lengths(blocks),
            state_lengths=_lengths(states),
            tokens=states.flatten().to_numpy(zero_copy_only=False),
        )


def _lengths(lists: Any) -> np.ndarray:
    """Lengths of the lists of an Arrow array; a missing list has none."""
    import pyarrow.compute

    return pyarrow.compute.list_value_length(lists).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)


def _check_columns(columns: Mapping[str, Any]) -> None:
    missing = [name for name in REQUIRED_COLUMNS[1:] if name not in columns]
    if missing:
        raise ValueError(
            f"Trajectories are measured on the columns response_ids and states; {', '.join(missing)} missing, got "
            f"{', '.join(columns) or 'none'}. Build the dataset with `cllm_hf.TrajectoryBuilder`."
        )


def _measure(chunk: _Chunk, block_size: int | None) -> TrajectoryStatistics:
    block_size = _check_chunk(chunk, block_size)
    states = chunk.tokens.reshape(-1, block_size)
    # Tokens of each block that lie in its response.
    record = np.repeat(np.arange(len(chunk.num_blocks)), chunk.num_blocks)
    number = np.arange(len(record)) - _starts(chunk.num_blocks)[record]
    valid = np.clip(chunk.response_lengths[record] - number * block_size, 0, block_size)
    figures = _figures(states, chunk.num_states, valid)
    is_kept = chunk.is_greedy[record] | (chunk.num_states > 1)
    return TrajectoryStatistics(
        block_size,
        num_records=len(chunk.num_blocks),
        num_tokens=int(chunk.response_lengths.sum()),
        num_left_out_blocks=int((~is_kept).sum()),
        num_left_out_tokens=int(valid[~is_kept].sum()),
        **{name: _count(figure[is_kept]) for name, figure in zip(_COUNTERS, figures)},
    )


def _check_chunk(chunk: _Chunk, block_size: int | None) -> int:
    """The block size of the chunk, if all is in order."""
    lengths = set(np.unique(chunk.state_lengths).tolist())
    expected = block_size if block_size is not None else min(lengths, default=0)
    needed = -(-chunk.response_lengths // max(expected, 1))
    if lengths - {expected} or expected < 1:
        raise ValueError(
            f"Every state must have `block_size` tokens, {expected or 'at least 1'}, got lengths {sorted(lengths)}. "
            "Measure datasets of different block sizes apart."
        )
    if (needed != chunk.num_blocks).any() or (chunk.num_states < 1).any():
        raise ValueError(
            "The blocks of a record must cover its response, each with at least one state, got "
            f"{int(chunk.num_blocks.sum())} blocks in {len(needed)} records whose responses take {int(needed.sum())}, "
            f"and {int((chunk.num_states < 1).sum())} blocks without a state. Build the dataset again."
        )
    return expected


def _figures(
    states: np.ndarray, num_states: np.ndarray, valid: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    Iterations, fast-forwarded and stationary tokens of each block.

    Args:
        states (`numpy.ndarray` of shape `(total_states, block_size)`): of all blocks, one after another.
        num_states (`numpy.ndarray` of shape `(num_blocks,)`): states of each block, at least one.
        valid (`numpy.ndarray` of shape `(num_blocks,)`): tokens of each block that lie in its response.
    """
    if not len(num_states):
        return num_states, num_states, num_states
    total_states, block_size = states.shape
    starts = _starts(num_states)
    block = np.repeat(np.arange(len(num_states)), num_states)
    # States are numbered from 1 within their block, so that 0 can stand for none.
    number = (np.arange(total_states) - starts[block] + 1)[:, None]
    positions = np.arange(block_size)
    wrong = (states != states[(starts + num_states - 1)[block]]) & (positions < valid[block][:, None])
    leading = np.where(wrong.any(1), wrong.argmax(1), valid[block])

    gained = np.diff(leading, append=0) - 1
    gained[starts + num_states - 1] = 0  # behind a fixed point stands another block
    fast_forwarded = np.add.reduceat(np.maximum(gained, 0), starts)

    # From the state after the last in which it is wrong, a token is right for good. It is stationary if in that state,
    # or a later one, something before it is still wrong.
    last_wrong = np.maximum.reduceat(np.where(wrong, number, 0), starts)
    last_behind_wrong = np.maximum.reduceat(np.where(leading[:, None] < positions, number, 0), starts)
    is_stationary = (last_behind_wrong > last_wrong) & (positions < valid[:, None])
    return num_states - 1, fast_forwarded, is_stationary.sum(1)


def _starts(lengths: np.ndarray) -> np.ndarray:
    """Where each of a row of pieces of these lengths begins."""
    return np.cumsum(lengths) - lengths


def _count(values: np.ndarray) -> Counter[int]:
    return Counter(dict(zip(*(array.tolist() for array in np.unique(values, return_counts=True)))))


def _mean(counter: Mapping[int, int]) -> float:
    blocks = sum(counter.values())
    return sum(value * number for value, number in counter.items()) / blocks if blocks else math.nan


def _check_one_block_size(statistics: Sequence[TrajectoryStatistics]) -> None:
    sizes = sorted({one.block_size for one in statistics})
    if len(sizes) > 1:
        raise ValueError(
            f"Statistics of different block sizes cannot be added or compared, got `block_size` {sizes}. Build both "
            "datasets with the same `block_size`."
        )
