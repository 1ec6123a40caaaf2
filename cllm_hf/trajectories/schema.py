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

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value

from ..blocks.layout import num_blocks
from .arrays import check_blocks, piece_starts


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
REQUIRED_COLUMNS = ("prompt_ids", "response_ids", "states")
# Rows that are checked at once: a few megabytes.
_ROWS_AT_ONCE = 1000


def features(augmented: bool = False) -> Features:
    """
    The columns of a trajectory dataset.

    Args:
        augmented (`bool`): whether each block has further states to train on, in the column `augmented_states`.

    Returns:
        `datasets.Features`: a new one; `FEATURES` are those without `augmented_states`.
    """
    columns = Features(dict(FEATURES))
    if augmented:
        columns["augmented_states"] = List(List(List(Value("int32"))))
    return columns


def end_points(states: list[list[list[int]]], response_length: int) -> list[int]:
    """
    Join the fixed points of a record's blocks, which is the response if all is right.

    Args:
        states (`list[list[list[int]]]`): the states of each block.
        response_length (`int`): tokens of the response; what stands after is padding.

    Returns:
        `list[int]`: the tokens.
    """
    return [token for block in states for token in block[-1]][:response_length]


def check_columns(columns: Features, names: Iterable[str] | None = None) -> None:
    """
    Check that a dataset has the columns of trajectories, and that they have the right types.

    Integers may have any width. Further columns may be there; they are not looked at.

    Args:
        columns (`datasets.Features`): the columns of the dataset.
        names (`Iterable[str]`, *optional*): which columns to look at, where there are such; by default all that a
            trajectory dataset may have. Those of `REQUIRED_COLUMNS` must be there.

    Raises:
        ValueError: for a missing column or one of another type.
    """
    check_names(columns)
    known = features(augmented=True)
    for name in known if names is None else names:
        if name in columns and not _same_kind(columns[name], known[name]):
            raise ValueError(
                f"Column `{name}` of a trajectory dataset must be of type {known[name]}, got {columns[name]}. Build "
                "the dataset with `cllm_hf.TrajectoryBuilder`, or convert the column with `dataset.cast_column`."
            )


def check_names(columns: Iterable[str]) -> None:
    """
    Check that there are the columns that training needs.

    Args:
        columns (`Iterable[str]`): names of the columns.

    Raises:
        ValueError: for a missing one.
    """
    columns = list(columns)
    missing = [name for name in REQUIRED_COLUMNS if name not in columns]
    if missing:
        raise ValueError(
            f"A trajectory record needs the columns {', '.join(REQUIRED_COLUMNS)}; {', '.join(missing)} missing, got "
            f"{', '.join(columns)}. Build the dataset with `cllm_hf.TrajectoryBuilder`."
        )


def _same_kind(feature: Any, known: Any) -> bool:
    import pyarrow.types as kinds

    (depth, leaf), (known_depth, known_leaf) = (_leaf(one) for one in (feature, known))
    if kinds.is_null(leaf):  # nothing but empty lists: the rows say what is wrong
        return depth <= known_depth
    tests = (kinds.is_integer, kinds.is_boolean, lambda leaf: kinds.is_string(leaf) or kinds.is_large_string(leaf))
    return depth == known_depth and any(test(leaf) and test(known_leaf) for test in tests)


def _leaf(feature: Any) -> tuple[int, Any]:
    """How many lists a column nests, and the Arrow type of what is in them."""
    import pyarrow.types as kinds

    inner, depth = Features({"column": feature}).arrow_schema.field(0).type, 0
    while kinds.is_list(inner) or kinds.is_large_list(inner) or kinds.is_fixed_size_list(inner):
        inner, depth = inner.value_type, depth + 1
    return depth, inner


def check_record(record: Mapping[str, Any], block_size: int | None = None) -> int:
    """
    Check one trajectory record.

    Args:
        record (`Mapping[str, Any]`): a row with the columns of `REQUIRED_COLUMNS`, and `augmented_states` or
            not.
        block_size (`int`, *optional*): what every state must have; by default what the first state has.

    Returns:
        `int`: the block size.

    Raises:
        ValueError: for a missing column, an empty prompt or response, missing values, states of different lengths, a
            number of blocks that does not cover the response, fixed points that are not the response, or augmented
            states that do not fit the blocks.
    """
    check_names(record)
    name = record.get("data_id", "?")
    response, states = record["response_ids"], record["states"]
    check_response(record)
    _check_missing(name, states, "`states`")
    expected = check_blocks(name, len(response), [list(map(len, block)) for block in states], block_size)
    if end_points(states, len(response)) != list(response):
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
    """
    Check prompt and response of a record: all that is needed of it where its states are not.

    Args:
        record (`Mapping[str, Any]`): a row.

    Raises:
        ValueError: if one of them is missing or empty, or lacks a token.
    """
    name, prompt, response = (record.get(column) for column in ("data_id", "prompt_ids", "response_ids"))
    name = "?" if name is None else name
    for column, tokens in (("prompt_ids", prompt), ("response_ids", response)):
        if not tokens:
            raise ValueError(
                f"A record needs tokens in the column `{column}`, got none in record {name}. Build the dataset with "
                "`cllm_hf.TrajectoryBuilder`, or drop that record."
            )
    _check_missing(name, [[prompt, response]], "`prompt_ids` and `response_ids`")


def _check_missing(name: str, blocks: Any, what: str) -> None:
    is_whole = blocks is not None and all(
        block is not None and all(state is not None and None not in state for state in block) for block in blocks
    )
    if not is_whole:
        raise ValueError(f"Record {name} has missing values in {what}. Drop it from the dataset.")


def check_tokens(record: Mapping[str, Any], vocab_size: int, columns: Iterable[str], name: object = "?") -> None:
    """
    Check that all tokens of a good record are in a vocabulary. What stands after the end of its response is padding,
    which may be any number.

    Args:
        record (`Mapping[str, Any]`): a row.
        vocab_size (`int`): tokens that the model has embeddings for.
        columns (`Iterable[str]`): where to look; those that are missing are left out.
        name (`object`): what to call a record that has no `data_id`.

    Raises:
        ValueError: for another token.
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


def check_dataset(dataset: Dataset, block_size: int | None = None) -> int:
    """
    Check that a dataset holds trajectories of one block size.

    Args:
        dataset (`datasets.Dataset`): the dataset; all its rows are read, as Arrow tables.
        block_size (`int`, *optional*): the block size that it must have.

    Returns:
        `int`: its block size.

    Raises:
        ValueError: if it is empty, a column has another type, or a row is not a trajectory record of that block size.
    """
    if len(dataset) == 0:
        raise ValueError("The trajectory dataset is empty. Build it from more prompts, or look at its drop counts.")
    names = [*REQUIRED_COLUMNS, *["augmented_states"] * ("augmented_states" in dataset.column_names)]
    num_good = 0
    if dataset.format["type"] != "custom":  # a transform may make the columns that are missing here
        check_columns(dataset.features, names)
        dataset = dataset.with_format(None)
        block_size = check_record(dataset[0], block_size)
        if all(_holds_integers(dataset.features[name]) for name in names):
            num_good = _count_good(dataset.select_columns(names).with_format("arrow"), block_size)
    # Row by row only from the first that is not good, which then says what is wrong with it.
    for number in range(num_good, len(dataset)):
        block_size = check_record(dataset[number], block_size)
    assert block_size is not None
    return block_size


def _holds_integers(feature: Any) -> bool:
    import pyarrow.types as kinds

    return kinds.is_integer(_leaf(feature)[1])


def _count_good(tables: Dataset, block_size: int) -> int:
    """Number of rows before the first that is no trajectory record of the block size."""
    number = 0
    for table in tables.iter(_ROWS_AT_ONCE):
        bad = _bad_rows(table, block_size)
        if bad.any():
            return number + int(bad.argmax())
        number += len(bad)
    return number


def _bad_rows(table: Any, block_size: int) -> np.ndarray:
    """
    Which rows `check_record` refuses.

    Args:
        table (`pyarrow.Table`): the columns of `REQUIRED_COLUMNS`, and `augmented_states` if there is one.
        block_size (`int`): of the states.

    Returns:
        `numpy.ndarray` of shape `(num_rows,)`: booleans.
    """
    columns = {name: table[name].combine_chunks() for name in table.column_names}
    bad = np.zeros(len(table), dtype=bool)
    rows = np.arange(len(table))
    prompt_lengths, *_ = _open(columns["prompt_ids"], rows, bad, are_tokens=True)
    response_lengths, response_tokens, _ = _open(columns["response_ids"], rows, bad, are_tokens=True)
    bad |= (prompt_lengths == 0) | (response_lengths == 0)
    needed = num_blocks(response_lengths, block_size)

    block_counts, blocks, row_of_block = _open(columns["states"], rows, bad)
    state_counts, states, row_of_state = _open(blocks, row_of_block, bad)
    state_lengths, tokens, _ = _open(states, row_of_state, bad, are_tokens=True)
    bad |= block_counts != needed
    bad[row_of_block[state_counts == 0]] = True
    bad[row_of_state[state_lengths != block_size]] = True

    if "augmented_states" in columns:
        nothing = np.zeros(len(table), dtype=bool)
        list_counts, lists, row_of_list = _open(columns["augmented_states"], rows, nothing)
        _, states, row_of_state = _open(lists, row_of_list, bad)
        augmented_lengths, *_ = _open(states, row_of_state, bad, are_tokens=True)
        bad |= (list_counts != needed) & ~nothing  # rows of other datasets may come without the column
        bad[row_of_state[augmented_lengths != block_size]] = True

    # Where the shapes are right: is the last state of each block its part of the response, token by token?
    is_good = ~bad[row_of_block]
    row = row_of_block[is_good]
    number = (np.arange(len(row_of_block)) - piece_starts(block_counts)[row_of_block])[is_good]
    offsets = number[:, None] * block_size + np.arange(block_size)
    in_response = offsets < response_lengths[row][:, None]
    last_states = (np.cumsum(state_counts) - 1)[is_good]
    ends = tokens[(piece_starts(state_lengths)[last_states][:, None] + np.arange(block_size))[in_response]]
    wanted = response_tokens[(piece_starts(response_lengths)[row][:, None] + offsets)[in_response]]
    bad[np.broadcast_to(row[:, None], offsets.shape)[in_response][ends != wanted]] = True
    return bad


def _open(
    lists: Any, rows: np.ndarray, bad: np.ndarray, are_tokens: bool = False
) -> tuple[np.ndarray, Any, np.ndarray]:
    """
    Open one level of nested lists, and mark the rows in which something is missing.

    Args:
        lists (`pyarrow.Array` of shape `(num_lists,)`): the lists.
        rows (`numpy.ndarray` of shape `(num_lists,)`): the row of the table that each lies in.
        bad (`numpy.ndarray` of shape `(num_rows,)`): booleans; changed in place.
        are_tokens (`bool`): whether the lists hold tokens.

    Returns:
        `tuple`: lengths of the lists; what they hold, end to end, tokens as a `numpy.ndarray`; and the rows that this
        lies in, for tokens without meaning.
    """
    import pyarrow.compute as compute

    _mark_missing(lists, rows, bad)
    lengths = compute.fill_null(compute.list_value_length(lists), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    values = lists.flatten()
    if not are_tokens:
        return lengths, values, np.repeat(rows, lengths)
    if values.null_count:  # there are many tokens, and hardly ever a missing one
        _mark_missing(values, np.repeat(rows, lengths), bad)
        values = compute.fill_null(values, 0)
    return lengths, values.to_numpy(zero_copy_only=False), rows


def _mark_missing(values: Any, rows: np.ndarray, bad: np.ndarray) -> None:
    if values.null_count:
        bad[rows[values.is_null().to_numpy(zero_copy_only=False)]] = True
