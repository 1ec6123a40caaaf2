"""Trajectory records as flat arrays, and what is counted on the states of all their blocks at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from ..blocks.layout import num_blocks
from ..blocks.rules import count_leading


_COLUMNS = ("response_ids", "states")
# Records that are laid out at once: a few MB of states.
_CHUNK = 500


@dataclass(frozen=True)
class RecordArrays:
    """
    Records one after another.

    Attributes:
        response_lengths (`numpy.ndarray` of shape `(num_records,)`): tokens of each response.
        is_greedy (`numpy.ndarray` of shape `(num_records,)`): whether it is the model's own greedy output.
        num_blocks (`numpy.ndarray` of shape `(num_records,)`): blocks of each record.
        num_states (`numpy.ndarray` of shape `(total_blocks,)`): states of each block.
        state_lengths (`numpy.ndarray` of shape `(total_states,)`): tokens of each state.
        tokens (`numpy.ndarray` of shape `(state_lengths.sum(),)`): the states end to end.
        first (`int`): number of the first of them in the dataset.
    """

    response_lengths: np.ndarray
    is_greedy: np.ndarray
    num_blocks: np.ndarray
    num_states: np.ndarray
    state_lengths: np.ndarray
    tokens: np.ndarray
    first: int = 0

    def check(self, block_size: int | None) -> int:
        """
        Check all records at once, as `check_blocks` does each.

        Args:
            block_size (`int`, *optional*): what every state must have; by default the least there is.

        Returns:
            `int`: the block size.

        Raises:
            ValueError: for the first record that `check_blocks` refuses.
        """
        least = int(self.state_lengths.min()) if len(self.state_lengths) else 0
        expected = block_size if block_size is not None else least
        record, is_wrong = self.record_of_block, np.zeros(len(self.num_blocks), dtype=bool)
        is_wrong |= num_blocks(self.response_lengths, max(expected, 1)) != self.num_blocks
        is_wrong[record[self.num_states < 1]] = True
        is_wrong[np.repeat(record, self.num_states)[self.state_lengths != expected]] = True
        if expected < 1 or is_wrong.any():
            row = int(is_wrong.argmax())
            check_blocks(self.first + row, int(self.response_lengths[row]), self._state_lengths_of(row), expected)
        return expected

    def _state_lengths_of(self, row: int) -> list[list[int]]:
        """Lengths of the states of each block of a record."""
        blocks = np.split(self.state_lengths, np.cumsum(self.num_states)[:-1])
        start = int(self.num_blocks[:row].sum())
        return [block.tolist() for block in blocks[start : start + int(self.num_blocks[row])]]

    @property
    def record_of_block(self) -> np.ndarray:
        """Number of the record of each block, of shape `(total_blocks,)`."""
        return np.repeat(np.arange(len(self.num_blocks)), self.num_blocks)

    def block_lengths(self, block_size: int) -> np.ndarray:
        """Tokens of each block that lie in its response, of shape `(total_blocks,)`."""
        record = self.record_of_block
        first = (np.arange(len(record)) - piece_starts(self.num_blocks)[record]) * block_size
        return np.clip(self.response_lengths[record] - first, 0, block_size)


def check_blocks(
    name: object, response_length: int, state_lengths: Sequence[Sequence[int]], block_size: int | None = None
) -> int:
    """
    Check that the states of a record have one size, and that its blocks cover its response.

    Args:
        name (`object`): name or number of the record, for errors.
        response_length (`int`): tokens of the response.
        state_lengths (`Sequence[Sequence[int]]`): tokens of each state of each block.
        block_size (`int`, *optional*): what every state must have; by default the least there is.

    Returns:
        `int`: the block size.

    Raises:
        ValueError: if not.
    """
    lengths = {length for block in state_lengths for length in block}
    expected = block_size if block_size is not None else min(lengths, default=0)
    if lengths != {expected} or expected < 1:
        raise ValueError(
            f"Every state must have `block_size` tokens, {expected or 'at least 1'}, got lengths {sorted(lengths)} in "
            f"record {name}. States that end early are padded to the block size, and datasets of different block "
            "sizes are used apart."
        )
    blocks = num_blocks(response_length, expected)
    if len(state_lengths) != blocks or not all(state_lengths):
        raise ValueError(
            f"Record {name} has {len(state_lengths)} blocks of states, but its response of {response_length} tokens "
            f"takes {blocks} blocks of {expected}, each with at least one state. Build the dataset again."
        )
    return expected


def lay_out(records: Iterable[Mapping[str, Any]] | Dataset) -> Iterator[RecordArrays]:
    """
    Lay records out as arrays, some hundred records at a time.

    Args:
        records (`Iterable[Mapping]` or `datasets.Dataset`): trajectory records; only the columns that are needed are
            read. Records without `is_greedy` are taken as greedy.

    Returns:
        `Iterator[RecordArrays]`: none without records.

    Raises:
        ValueError: if a column is missing.
    """
    if not isinstance(records, Dataset):
        iterator, first = iter(records), 0
        while rows := list(islice(iterator, _CHUNK)):
            yield replace(_from_rows(rows), first=first)
            first += len(rows)
        return
    _check_columns(records.column_names)
    names = [name for name in (*_COLUMNS, "is_greedy") if name in records.column_names]
    tables = records.select_columns(names).with_format("arrow").iter(_CHUNK)
    for number, table in enumerate(tables):
        yield replace(_from_table(table), first=number * _CHUNK)


def _from_rows(rows: list[Mapping[str, Any]]) -> RecordArrays:
    for row in rows:
        _check_columns(row)
    blocks = [block for row in rows for block in row["states"]]
    states = [state for block in blocks for state in block]
    return RecordArrays(
        response_lengths=np.array([len(row["response_ids"]) for row in rows]),
        is_greedy=np.array([row.get("is_greedy") is None or bool(row["is_greedy"]) for row in rows]),
        num_blocks=np.array([len(row["states"]) for row in rows]),
        num_states=np.array([len(block) for block in blocks], dtype=np.int64),
        state_lengths=np.array([len(state) for state in states], dtype=np.int64),
        tokens=np.array([token for state in states for token in state], dtype=np.int64),
    )


def _from_table(table: Any) -> RecordArrays:
    rows = table["states"].combine_chunks()
    blocks = rows.flatten()
    states = blocks.flatten()
    is_greedy = np.ones(len(rows), dtype=bool)
    if "is_greedy" in table.column_names:
        is_greedy = table["is_greedy"].fill_null(True).to_numpy().astype(bool)
    return RecordArrays(
        response_lengths=_lengths(table["response_ids"].combine_chunks()),
        is_greedy=is_greedy,
        num_blocks=_lengths(rows),
        num_states=_lengths(blocks),
        state_lengths=_lengths(states),
        tokens=states.flatten().to_numpy(zero_copy_only=False),
    )


def _lengths(lists: Any) -> np.ndarray:
    """Lengths of the lists of an Arrow array; a missing list has none."""
    import pyarrow.compute

    return pyarrow.compute.list_value_length(lists).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)


def _check_columns(names: Iterable[str]) -> None:
    missing = [name for name in _COLUMNS if name not in names]
    if missing:
        raise ValueError(
            f"Trajectories need the columns {', '.join(_COLUMNS)}; {', '.join(missing)} missing, got "
            f"{', '.join(names) or 'none'}. Build the dataset with `cllm_hf.TrajectoryBuilder`."
        )


def count_by_block(
    states: np.ndarray, num_states: np.ndarray, block_lengths: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    Count the iterations, fast-forwarded and stationary tokens of each block, as `TrajectoryStatistics` defines them.

    Args:
        states (`numpy.ndarray` of shape `(total_states, block_size)`): states of all blocks, one after another.
        num_states (`numpy.ndarray` of shape `(num_blocks,)`): states of each block, at least one.
        block_lengths (`numpy.ndarray` of shape `(num_blocks,)`): tokens of each block that lie in its response; what
            stands after is padding and counts as right.

    Returns:
        three `numpy.ndarray` of shape `(num_blocks,)`.
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


def piece_starts(lengths: np.ndarray) -> np.ndarray:
    """
    Find where each of a row of pieces begins.

    Args:
        lengths (`numpy.ndarray` of shape `(num_pieces,)`): of the pieces.

    Returns:
        `numpy.ndarray` of shape `(num_pieces,)`.
    """
    return np.cumsum(lengths) - lengths
