"""
The trajectory record: one row a response, and the checks that a dataset holds such rows.

`states[b][j]` is state `j` of block `b`: `states[b][0]` is its first draft and `states[b][-1]` its fixed point, which
is stored once. Every state has `block_size` tokens; after the end of the response they are padding and mean nothing.
`is_greedy` is whether the response is the target model's own greedy output, where either token of a near tie counts as
greedy (`blocks.rules`); where it is not, the blocks in which it departs from that hold one state, the response's own
tokens. `augmented_states[b]`, where a dataset has that column, are further states of block `b`: for training, and no
part of its trajectory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value

from ..blocks.layout import num_blocks


FEATURES = Features(
    {
        "data_id": Value("string"),
        "prompt": Value("string"),
        "response": Value("string"),
        "prompt_ids": List(Value("int32")),
        "response_ids": List(Value("int32")),
        "states": List(List(List(Value("int32")))),
        "is_greedy": Value("bool"),
    }
)
RESPONSE_COLUMNS = ("prompt_ids", "response_ids")
REQUIRED_COLUMNS = (*RESPONSE_COLUMNS, "states")
# Columns of trajectories that a dataset of responses alone lacks.
_OF_STATES = ("states", "is_greedy")
EMPTY = "The trajectory dataset is empty. Build it from more prompts, or look at its drop counts."
_MEASURED_COLUMNS = ("response_ids", "states")
# Rows that are laid out and checked at once: a few megabytes.
_ROWS_AT_ONCE = 500


def features(augmented: bool = False, responses_only: bool = False) -> Features:
    """
    The columns of a trajectory dataset: `FEATURES`, and `augmented_states` if each block has further states; those of
    responses alone lack states and what is said of them.
    """
    left_out = _OF_STATES if responses_only else ()
    columns = Features({name: feature for name, feature in FEATURES.items() if name not in left_out})
    if augmented:
        columns["augmented_states"] = List(List(List(Value("int32"))))
    return columns


# --- columns ----------------------------------------------------------------------------------------------------


def check_names(columns: Iterable[str], needed: Sequence[str] = REQUIRED_COLUMNS) -> None:
    """Raise a `ValueError` if a column is missing."""
    columns = list(columns)
    missing = [name for name in needed if name not in columns]
    if missing == ["states"]:
        raise ValueError(
            f"States are needed here, got a dataset without, with the columns {', '.join(columns)}. Collect without "
            "`responses_only`; or train with `--trajectory-source online` or `--lossless`, which need no states."
        )
    if missing:
        raise ValueError(
            f"A trajectory record needs the columns {', '.join(needed)}; {', '.join(missing)} missing, got "
            f"{', '.join(columns) or 'none'}. Build the dataset with `cllm_hf.TrajectoryBuilder`; or, for "
            "`--lossless` and `--trajectory-source online`, have columns `prompt` and `response` (or `completion`)."
        )


def check_columns(
    columns: Features, names: Iterable[str] | None = None, needed: Sequence[str] = REQUIRED_COLUMNS
) -> None:
    """
    Raise a `ValueError` for a needed column that is missing, and for one of another type; `names` says which ones
    to look at. Integers may have any width. Further columns may be there; they are not looked at.
    """
    check_names(columns, needed)
    known = features(augmented=True)
    for name in known if names is None else names:
        if name in columns and not _same_kind(columns[name], known[name]):
            raise ValueError(
                f"Column `{name}` of a trajectory dataset must be of type {known[name]}, got {columns[name]}. Build "
                "the dataset with `cllm_hf.TrajectoryBuilder`, or convert the column with `dataset.cast_column`."
            )


def _same_kind(feature: Any, known: Any) -> bool:
    (depth, leaf), (known_depth, known_leaf) = (_depth_and_leaf(one) for one in (feature, known))
    if pa.types.is_null(leaf):  # nothing but empty lists: the rows say what is wrong
        return depth <= known_depth
    tests = (
        pa.types.is_integer,
        pa.types.is_boolean,
        lambda leaf: pa.types.is_string(leaf) or pa.types.is_large_string(leaf),
    )
    return depth == known_depth and any(test(leaf) and test(known_leaf) for test in tests)


def _depth_and_leaf(feature: Any) -> tuple[int, Any]:
    """How many lists a column nests, and the Arrow type of what is in them."""
    inner, depth = Features({"column": feature}).arrow_schema.field(0).type, 0
    while _is_list(inner):
        inner, depth = inner.value_type, depth + 1
    return depth, inner


def _is_list(kind: Any) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


# --- single records ---------------------------------------------------------------------------------------------


def check_record(record: Mapping[str, Any], block_size: int | None = None) -> int:
    """
    Check one trajectory record, with `augmented_states` or without, and return its block size.

    Raises:
        ValueError: for a missing column, an empty prompt or response, missing values, states of different lengths or
            not of `block_size`, a number of blocks that does not cover the response, fixed points that are not the
            response, or augmented states that do not fit the blocks.
    """
    check_names(record)
    name = record.get("data_id", "?")
    response, states = record["response_ids"], record["states"]
    check_response(record)
    _check_missing(name, states, "`states`")
    expected = _check_blocks(name, len(response), states, block_size)
    if [token for block in states for token in block[-1]][: len(response)] != list(response):
        raise ValueError(f"The blocks of record {name} do not end in its response. Drop it from the dataset.")
    augmented = record.get("augmented_states")  # `None` too where datasets with and without it were joined
    if augmented is not None:
        _check_missing(name, augmented, "`augmented_states`")
        lengths = {len(state) for block in augmented for state in block}
        if len(augmented) != len(states) or lengths - {expected}:
            raise ValueError(
                f"`augmented_states` must have a list of states for each block, with {expected} tokens each, got "
                f"{len(augmented)} lists for {len(states)} blocks and lengths {sorted(lengths)} in record {name}. "
                "Build the dataset again, or remove the column."
            )
    return expected


def check_response(record: Mapping[str, Any]) -> None:
    """Raise a `ValueError` if prompt or response is empty or lacks a token: all that is needed without states."""
    name, prompt, response = (record.get(column) for column in ("data_id", "prompt_ids", "response_ids"))
    name = "?" if name is None else name
    for column, tokens in (("prompt_ids", prompt), ("response_ids", response)):
        if not tokens:
            found = f"none in record {name}" if column in record else f"the columns {', '.join(map(str, record))}"
            remedy = "drop that record" if column in record else "name columns of text `prompt` and `response`"
            raise ValueError(
                f"A record needs tokens in the column `{column}`, got {found}. Build the dataset with "
                f"`cllm_hf.TrajectoryBuilder`, or {remedy}."
            )
    _check_missing(name, [[prompt, response]], "`prompt_ids` and `response_ids`")


def _check_missing(name: object, blocks: Any, what: str) -> None:
    is_whole = blocks is not None and all(
        block is not None and all(state is not None and None not in state for state in block) for block in blocks
    )
    if not is_whole:
        raise ValueError(f"Record {name} has missing values in {what}. Drop it from the dataset.")


def _check_blocks(name: object, response_length: int, states: Any, block_size: int | None) -> int:
    """Check that the states of a record have one size, and that its blocks cover its response; return the size."""
    lengths = {len(state) for block in states for state in block}
    expected = block_size if block_size is not None else min(lengths, default=0)
    if lengths != {expected} or expected < 1:
        raise ValueError(
            f"Every state must have `block_size` tokens, {expected or 'at least 1'}, got lengths {sorted(lengths)} in "
            f"record {name}. States that end early are padded to the block size, and datasets of different block "
            "sizes are used apart."
        )
    blocks = num_blocks(response_length, expected)
    if len(states) != blocks or not all(map(len, states)):
        raise ValueError(
            f"Record {name} has {len(states)} blocks of states, but its response of {response_length} tokens "
            f"takes {blocks} blocks of {expected}, each with at least one state. Build the dataset again."
        )
    return expected


def check_tokens(record: Mapping[str, Any], vocab_size: int, columns: Iterable[str], name: object = "?") -> None:
    """
    Raise a `ValueError` if a token of a good record is outside a vocabulary. What stands after the end of its response
    is padding, which may be any number; columns that are missing are left out.
    """
    length = len(record["response_ids"])
    for column in columns:
        found = record.get(column)
        if found is None:
            continue
        parts: Iterable[Any] = [found]
        if column in ("states", "augmented_states"):
            parts = (
                state[: max(length - number * len(state), 0)] for number, block in enumerate(found) for state in block
            )
        for tokens in parts:
            if len(tokens) and not 0 <= min(tokens) <= max(tokens) < vocab_size:
                wrong = min(tokens) if min(tokens) < 0 else max(tokens)
                raise ValueError(
                    f"Every token must be in the model's vocabulary of {vocab_size}, got {wrong} in `{column}` of "
                    f"record {record.get('data_id', name)}. Train the model that made the trajectories, or resize its "
                    "embeddings."
                )


# --- datasets ---------------------------------------------------------------------------------------------------


def check_responses(dataset: Dataset) -> None:
    """
    Check that a dataset without states holds prompts and responses as tokens.

    Raises:
        ValueError: if it is empty, a column is missing or of another type, or a row has no prompt or no response.
    """
    if len(dataset) == 0:
        raise ValueError(EMPTY)
    check_columns(dataset.features, RESPONSE_COLUMNS, RESPONSE_COLUMNS)
    dataset = dataset.with_format(None)
    tables = dataset.select_columns(RESPONSE_COLUMNS).with_format("arrow").iter(_ROWS_AT_ONCE)
    for first, table in zip(range(0, len(dataset), _ROWS_AT_ONCE), tables):
        columns = [_open_column(table, name) for name in RESPONSE_COLUMNS]
        if not all(
            _to_numpy(lengths).all() and not (lengths.null_count or ids.null_count) for lengths, ids in columns
        ):
            for number in range(first, first + len(table)):
                check_response(dataset[number])


def check_dataset(dataset: Dataset, block_size: int | None = None) -> int:
    """
    Check that a dataset holds trajectories of one block size, and return it.

    Raises:
        ValueError: if it is empty, a column has another type, or a row is not a trajectory record of that block size.
    """
    if len(dataset) == 0:
        raise ValueError(EMPTY)
    if dataset.format["type"] == "custom":  # a transform may make the columns that are missing here
        for record in dataset:
            block_size = check_record(record, block_size)
        assert block_size is not None
        return block_size
    names = [*REQUIRED_COLUMNS, *["augmented_states"] * ("augmented_states" in dataset.column_names)]
    check_columns(dataset.features, names)
    dataset = dataset.with_format(None)
    block_size = check_record(dataset[0], block_size)
    tables = dataset.select_columns(names).with_format("arrow").iter(_ROWS_AT_ONCE)
    for first, table in zip(range(0, len(dataset), _ROWS_AT_ONCE), tables):
        if not _are_good(table, block_size):  # then one of them says what is wrong
            for number in range(first, first + len(table)):
                check_record(dataset[number], block_size)
    return block_size


def _are_good(table: pa.Table, block_size: int) -> bool:
    """Whether all rows of a table are sure to pass `check_record`, all at once."""
    columns = {name: _open_column(table, name) for name in table.column_names}
    if any(level.null_count for name in REQUIRED_COLUMNS for level in columns[name]):
        return False
    is_greedy = np.ones(len(table), dtype=bool)  # is not looked at
    arrays = RecordArrays(_to_numpy(columns["response_ids"][0]), is_greedy, *map(_to_numpy, columns["states"]))
    if not (_to_numpy(columns["prompt_ids"][0]).all() and arrays.response_lengths.all() and arrays.fit(block_size)):
        return False
    ends = arrays.tokens.reshape(-1, block_size)[np.cumsum(arrays.num_states) - 1]  # [total_blocks, block_size]
    is_inside = np.arange(block_size) < arrays.block_lengths(block_size)[:, None]
    if not np.array_equal(ends[is_inside], _to_numpy(columns["response_ids"][1])):
        return False
    if "augmented_states" not in columns:
        return True
    per_row, *inner = columns["augmented_states"]  # rows of other datasets may come without the column
    if any(level.null_count for level in inner):
        return False
    has_states = per_row.is_valid().to_numpy(zero_copy_only=False)
    fits = np.array_equal(_to_numpy(per_row)[has_states], arrays.num_blocks[has_states])
    return fits and bool((_to_numpy(inner[1]) == block_size).all())


@dataclass(frozen=True)
class RecordArrays:
    """Records one after another, with the states of all their blocks end to end."""

    response_lengths: np.ndarray  # [num_records]
    is_greedy: np.ndarray  # [num_records]: whether the response is the model's own greedy output
    num_blocks: np.ndarray  # [num_records]
    num_states: np.ndarray  # [total_blocks]
    state_lengths: np.ndarray  # [total_states]
    tokens: np.ndarray  # [state_lengths.sum()]

    def fit(self, block_size: int) -> bool:
        """Whether all states have that size, and the blocks of each record cover its response."""
        return bool(
            block_size > 0
            and (self.state_lengths == block_size).all()
            and self.num_states.all()
            and (num_blocks(self.response_lengths, block_size) == self.num_blocks).all()
        )

    @property
    def record_of_block(self) -> np.ndarray:
        """Number of the record of each block, of shape `(total_blocks,)`."""
        return np.repeat(np.arange(len(self.num_blocks)), self.num_blocks)

    def block_lengths(self, block_size: int) -> np.ndarray:
        """Tokens of each block that lie in its response, of shape `(total_blocks,)`."""
        record = self.record_of_block
        first = (np.arange(len(record)) - piece_starts(self.num_blocks)[record]) * block_size
        return np.clip(self.response_lengths[record] - first, 0, block_size)


def lay_out(
    records: Iterable[Mapping[str, Any]] | Dataset, block_size: int | None = None
) -> Iterator[tuple[int, RecordArrays]]:
    """
    Lay records out as arrays, some hundred at a time, each with their block size; by default that of the first ones.
    Of a dataset only the columns that are needed are read. Records without `is_greedy` are taken as greedy.

    Raises:
        ValueError: if a column is missing, the states of a record are not of the block size, or its blocks do not
            cover its response.
    """
    parts: Iterable[Any]
    if isinstance(records, Dataset):
        check_names(records.column_names, _MEASURED_COLUMNS)
        names = [name for name in (*_MEASURED_COLUMNS, "is_greedy") if name in records.column_names]
        parts = records.select_columns(names).with_format("arrow").iter(_ROWS_AT_ONCE)
    else:
        iterator = iter(records)
        parts = iter(lambda: list(islice(iterator, _ROWS_AT_ONCE)), [])
    first = 0
    for part in parts:
        arrays = _lay_out_rows(part) if isinstance(part, list) else _lay_out_table(part)
        if block_size is None:
            block_size = int(arrays.state_lengths.min()) if len(arrays.state_lengths) else 0
        if not arrays.fit(block_size):
            for number, row in enumerate(part if isinstance(part, list) else part.to_pylist(), first):
                _check_missing(number, [[row["response_ids"]]], "`response_ids`")
                _check_missing(number, row["states"], "`states`")
                _check_blocks(number, len(row["response_ids"]), row["states"], block_size)
        yield block_size, arrays
        first += len(part)


def _lay_out_rows(rows: list[Mapping[str, Any]]) -> RecordArrays:
    for row in rows:
        check_names(row, _MEASURED_COLUMNS)
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


def _lay_out_table(table: pa.Table) -> RecordArrays:
    is_greedy = np.ones(len(table), dtype=bool)
    if "is_greedy" in table.column_names:
        is_greedy = table["is_greedy"].fill_null(True).to_numpy().astype(bool)
    response_lengths, _ = _open_column(table, "response_ids")
    return RecordArrays(_to_numpy(response_lengths), is_greedy, *map(_to_numpy, _open_column(table, "states")))


def _open_column(table: pa.Table, name: str) -> list[pa.Array]:
    """What `open_lists` makes of a column, also where that has nothing but empty lists."""
    levels = open_lists(table[name])
    if pa.types.is_integer(levels[-1].type):
        return levels
    kind = pa.list_(pa.int64())
    if name in ("states", "augmented_states"):
        kind = pa.list_(pa.list_(kind))
    return open_lists(table[name].cast(kind))


def open_lists(column: pa.ChunkedArray) -> list[pa.Array]:
    """The lengths of nested lists from the outside in, and last what is in them, end to end."""
    levels, inner = [], column.combine_chunks()
    while _is_list(inner.type):
        levels.append(pc.list_value_length(inner))
        inner = pc.list_flatten(inner)
    return [*levels, inner]


def _to_numpy(level: pa.Array) -> np.ndarray:
    return pc.fill_null(level, 0).to_numpy(zero_copy_only=False)


def piece_starts(lengths: np.ndarray) -> np.ndarray:
    """Where each of some pieces that lie end to end begins, of the shape of their lengths."""
    return np.cumsum(lengths) - lengths
