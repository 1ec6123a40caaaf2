"""Checks that the datasets hold what an objective needs, before any work is done."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from datasets import Dataset

from ..decoding.options import DEFAULT_BLOCK_SIZE
from ..trajectories.schema import check_dataset, check_record
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
        elif isinstance(dataset, Dataset):
            block_size = check_dataset(dataset, block_size)
        else:
            block_size = check_record(first, block_size)
        if config.ar_labels == "ground_truth":
            get_labels(first)
    return block_size or DEFAULT_BLOCK_SIZE


def check_response(record: Mapping[str, Any]) -> None:
    """
    Check what training without stored states needs of a record.

    Args:
        record (`Mapping[str, Any]`): a row.

    Raises:
        ValueError: if it has no prompt or no response, as token ids.
    """
    for name in ("prompt_ids", "response_ids"):
        if not record.get(name):
            raise ValueError(
                f"Training needs tokens in the column `{name}`, got none in record {record.get('data_id', '?')}. "
                "Build the dataset with `cllm_hf.TrajectoryBuilder`, or drop that record."
            )


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
