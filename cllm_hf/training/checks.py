"""Checks that the datasets hold what an objective needs, before any work is done."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from ..options import DEFAULT_BLOCK_SIZE
from ..trajectories.schema import check_dataset, check_record, check_response, check_tokens
from .config import CLLMConfig


def check_datasets(train_dataset: Any, eval_dataset: Any, config: CLLMConfig) -> int:
    """
    Check the datasets of a training.

    Args:
        train_dataset (`datasets.Dataset` or `datasets.IterableDataset`): trajectories.
        eval_dataset (the same, a `dict` of them, or `None`): trajectories.
        config (`CLLMConfig`): options.

    Returns:
        `int`: the block size of the trajectories, or of the options where no trajectories are needed.

    Raises:
        ValueError: for a dataset that is missing, is a dictionary of splits, is empty, does not hold trajectories of
            one block size, or has no `label_ids` where they are wanted.
    """
    if train_dataset is None:
        raise ValueError("`train_dataset` is required: trajectories from `cllm_hf.TrajectoryBuilder`, got none.")
    if isinstance(train_dataset, dict):
        raise ValueError(
            f"`train_dataset` must be one dataset, got a dictionary of {', '.join(map(str, train_dataset))}. Pass "
            "one of them, such as `dataset['train']`."
        )
    datasets = [train_dataset, *(eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset])]
    block_size = config.block_size
    for dataset in datasets:
        if dataset is None:
            continue
        # Of an iterable dataset the first record; the collator looks at every one on its way.
        first = _first(dataset)
        if config.trajectory_source == "online":
            check_response(first)
            if block_size is None and first.get("states"):
                block_size = len(first["states"][0][-1])
        elif isinstance(dataset, Dataset):
            _check_block_size(first, config)
            block_size = check_dataset(dataset, block_size)
        else:
            block_size = check_record(first, block_size)
        if config.ar_labels == "ground_truth":
            get_labels(first)
        if isinstance(dataset, Dataset) and dataset.format["type"] is None:
            _check_lengths(dataset, config, 1 if config.trajectory_source == "online" else block_size or 1)
    return block_size or DEFAULT_BLOCK_SIZE


def _check_block_size(record: Mapping[str, Any], config: CLLMConfig) -> None:
    found = len(record["states"][0][-1]) if record.get("states") and record["states"][0] else None
    if config.block_size is not None and found is not None and found != config.block_size:
        raise ValueError(
            f"`block_size={config.block_size}` must be that of the trajectories, {found}. Pass "
            f"`block_size_schedule=[{config.block_size}]` to cut or join their blocks, or collect new ones."
        )


def _check_lengths(dataset: Dataset, config: CLLMConfig, least: int) -> None:
    """Find the records at which a run would end: without a prompt, response or label, or without room for them."""
    names = ["prompt_ids", "response_ids"] + ["label_ids"] * (config.ar_labels == "ground_truth")
    start = 0
    for table in dataset.select_columns(names).with_format("arrow").iter(1000):
        lengths = {name: pc.fill_null(pc.list_value_length(table[name]), 0).to_numpy() for name in names}
        for name in names:
            bad = np.flatnonzero(lengths[name] == 0)
            if len(bad):
                record = dataset[start + int(bad[0])]
                if name == "label_ids":
                    get_labels(record)
                check_response(record)
        if config.max_length is not None:
            room = config.max_length - lengths["prompt_ids"]
            bad = np.flatnonzero((room < least) & (room < lengths["response_ids"]))
            if len(bad):
                row = int(bad[0])
                raise ValueError(
                    f"A prompt of {lengths['prompt_ids'][row]} tokens, in row {start + row}, leaves no room for a "
                    f"block of {least} in `max_length={config.max_length}`. Raise `max_length`, or drop such records "
                    "with `dataset.filter`."
                )
        start += len(table)


def check_vocabulary(datasets: Iterable[Any], vocab_size: int, columns: list[str]) -> None:
    """
    Check that the tokens of datasets that `check_datasets` has passed are in the model's vocabulary.

    Args:
        datasets (`Iterable[datasets.Dataset | datasets.IterableDataset | None]`): trajectories. Of a stream only the
            first record is read; the collator looks at every one on its way.
        vocab_size (`int`): tokens that the model has embeddings for.
        columns (`list[str]`): where to look.

    Raises:
        ValueError: for the first record that has another token.
    """
    for dataset in datasets:
        if isinstance(dataset, Dataset):
            for number in _suspects(dataset, vocab_size, columns):
                check_tokens(dataset[number], vocab_size, columns, name=number)
        elif dataset is not None:
            check_tokens(_first(dataset), vocab_size, columns)


def _suspects(dataset: Dataset, vocab_size: int, columns: list[str]) -> Iterator[int]:
    """Numbers of records among which is one with such a token, if only in its padding."""
    if dataset.format["type"] == "custom":  # a transform makes the tokens
        yield from range(len(dataset))
        return
    start = 0
    present = [name for name in columns if name in dataset.column_names]
    for table in dataset.select_columns(present).with_format("arrow").iter(1000):
        bounds = [_bounds(column) for column in table.columns]
        if min(low for low, _ in bounds) < 0 or max(high for _, high in bounds) >= vocab_size:
            yield from range(start, start + len(table))
        start += len(table)


def _bounds(column: Any) -> tuple[int, int]:
    """The lowest and the highest number in nested lists; zeros where there is none."""
    while pa.types.is_nested(column.type):
        column = pc.list_flatten(column)
    found = pc.min_max(column).as_py()
    return found["min"] or 0, found["max"] or 0


def get_labels(record: Mapping[str, Any]) -> list[int]:
    """
    Look up the ground-truth answer of a record.

    Args:
        record (`Mapping[str, Any]`): a row.

    Returns:
        `list[int]`: its tokens.

    Raises:
        ValueError: if it has none.
    """
    if not record.get("label_ids"):
        raise ValueError(
            f'`ar_labels="ground_truth"` needs tokens in the column `label_ids`, got none in record '
            f'{record.get("data_id", "?")}. Add the column with `dataset.map`, or use `ar_labels="response"`.'
        )
    return list(record["label_ids"])


def check_trainable(model: Any) -> None:
    """
    Check that there is something to train.

    Args:
        model (`torch.nn.Module`): the model, with an adapter or without.

    Raises:
        ValueError: if no parameter takes a gradient.
    """
    if any(parameter.requires_grad for parameter in model.parameters()):
        return
    if hasattr(model, "peft_config"):
        remedy = "Load the adapter with `PeftModel.from_pretrained(base_model, path, is_trainable=True)`"
    else:
        remedy = "Call `model.requires_grad_(True)`, or pass a `peft_config`"
    raise ValueError(
        f"A model that is trained must have parameters that take a gradient, got none in {type(model).__name__}. "
        f"{remedy}."
    )


def _first(dataset: Iterable[dict[str, Any]]) -> dict[str, Any]:
    for record in dataset:
        return record
    raise ValueError("The trajectory dataset is empty. Build it from more prompts, or look at its drop counts.")


def check_leftovers(folder: Path, is_adapter: bool) -> None:
    """
    Check that a folder holds no model of the other kind: whoever loads it would get that one, or both.

    Args:
        folder (`pathlib.Path`): where the trained model goes.
        is_adapter (`bool`): whether that is an adapter.

    Raises:
        ValueError: if it does.
    """
    kind, other, name = ("adapter", "whole model", "config.json")
    if not is_adapter:
        kind, other, name = ("whole model", "adapter", "adapter_config.json")
    if (folder / name).is_file():
        raise ValueError(
            f"The output folder would hold two models: {str(folder)!r} has the {other} of an earlier run, and now "
            f"comes {'an' if is_adapter else 'a'} {kind}. Choose another output folder, or empty that one."
        )
