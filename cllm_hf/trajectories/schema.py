"""
The trajectory record: one row a response, and the checks that a dataset holds such rows.

`states[b][j]` is state `j` of block `b`: `states[b][0]` is its first draft and `states[b][-1]` its fixed point, which
is stored once. Every state has `block_size` tokens; behind the end of the response they are padding and mean nothing.
`is_greedy` is whether the response is the target model's own greedy output; where it is not, the blocks in which it
departs from that hold one state, the response's own tokens. `augmented_states[b]`, where a dataset has that column, are
further states of block `b`: for training, and no part of its trajectory.
"""

from __future__ import annotations

from datasets import Dataset, Features, List, Value


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


def num_blocks(response_length: int, block_size: int) -> int:
    """
    Number of blocks that cover a response.

    Args:
        response_length (`int`): tokens of the response, stop token included.
        block_size (`int`): tokens of a block.

    Returns:
        `int`.
    """
    return -(-response_length // block_size)


def end_points(states: list[list[list[int]]], response_length: int) -> list[int]:
    """
    Join the fixed points of a record's blocks, which is the response if all is right.

    Args:
        states (`list[list[list[int]]]`): the states of each block.
        response_length (`int`): tokens of the response; what stands behind is padding.

    Returns:
        `list[int]`: the tokens.
    """
    return [token for block in states for token in block[-1]][:response_length]


def check_record(record: dict, block_size: int | None = None) -> int:
    """
    Check one trajectory record.

    Args:
        record (`dict`): a row with the columns of `REQUIRED_COLUMNS`, and `augmented_states` or not.
        block_size (`int`, *optional*): what every state must have; by default what the first state has.

    Returns:
        `int`: the block size.

    Raises:
        ValueError: for a missing column, an empty prompt or response, states of different lengths, a number of blocks
            that does not cover the response, fixed points that are not the response, or augmented states that do not
            fit the blocks.
    """
    missing = [name for name in REQUIRED_COLUMNS if name not in record]
    if missing:
        raise ValueError(
            f"A trajectory record needs the columns {', '.join(REQUIRED_COLUMNS)}; {', '.join(missing)} missing, got "
            f"{', '.join(record)}. Build the dataset with `cllm_hf.TrajectoryBuilder`."
        )
    name = record.get("data_id", "?")
    if not record["prompt_ids"] or not record["response_ids"]:
        raise ValueError(f"Record {name} has an empty prompt or response. Drop it from the dataset.")
    lengths = {len(state) for block in record["states"] for state in block}
    expected = block_size if block_size is not None else min(lengths, default=0)
    if lengths != {expected} or expected < 1:
        raise ValueError(
            f"Every state must have `block_size` tokens, {expected or 'at least 1'}, got lengths {sorted(lengths)} in "
            f"record {name}. States that end early are padded to the block size."
        )
    blocks = num_blocks(len(record["response_ids"]), expected)
    if len(record["states"]) != blocks or not all(record["states"]):
        raise ValueError(
            f"Record {name} has {len(record['states'])} blocks of states, but its response of "
            f"{len(record['response_ids'])} tokens takes {blocks} blocks of {expected}, each with at least one state."
        )
    if end_points(record["states"], len(record["response_ids"])) != list(record["response_ids"]):
        raise ValueError(f"The blocks of record {name} do not end in its response. Drop it from the dataset.")
    augmented = record.get("augmented_states")  # `None` too where datasets with and without it were joined
    if augmented is not None:
        lengths = {len(state) for block in augmented for state in block}
        if len(augmented) != blocks or lengths - {expected}:
            raise ValueError(
                f"`augmented_states` must have a list of states for each block, with {expected} tokens each, got "
                f"{len(augmented)} lists for {blocks} blocks and lengths {sorted(lengths)} in record {name}. Build the "
                "dataset again, or remove the column."
            )
    return expected


def check_dataset(dataset: Dataset, block_size: int | None = None) -> int:
    """
    Check that a dataset holds trajectories of one block size.

    Args:
        dataset (`datasets.Dataset`): the dataset; all its rows are read.
        block_size (`int`, *optional*): the block size that it must have.

    Returns:
        `int`: its block size.

    Raises:
        ValueError: if it is empty or a row is not a trajectory record of that block size.
    """
    if len(dataset) == 0:
        raise ValueError("The trajectory dataset is empty. Build it from more prompts, or look at its drop counts.")
    missing = [name for name in REQUIRED_COLUMNS if name not in dataset.column_names]
    columns = dataset if missing else dataset.select_columns(list(REQUIRED_COLUMNS))
    for record in columns:
        block_size = check_record(record, block_size)
    assert block_size is not None
    return block_size
