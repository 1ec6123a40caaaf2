"""Folders that `datasets.Dataset.save_to_disk` has written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, load_from_disk

from ..files import check_file_place, path_inside


# Which files `save_to_disk` leaves for one dataset, and for several splits.
_STATE_NAME, _INFO_NAME, _SPLITS_NAME = "state.json", "dataset_info.json", "dataset_dict.json"


def is_saved(folder: Path) -> bool:
    """
    Whether `save_to_disk` has written a folder.

    Args:
        folder (`pathlib.Path`): the folder.

    Returns:
        `bool`.
    """
    return any((folder / name).is_file() for name in (_STATE_NAME, _SPLITS_NAME))


def load_saved(
    folder: Path, split: str | None, name: str | None, streaming: bool
) -> Dataset | IterableDataset | dict[str, Any]:
    """
    Load what `save_to_disk` has written, if it names no files outside its folder.

    Args:
        folder (`pathlib.Path`): the folder.
        split (`str`, *optional*): which part; `None` loads all.
        name (`str`, *optional*): of a configuration, of which there are none here.
        streaming (`bool`): whether to read rows when they are asked for.

    Returns:
        `datasets.Dataset`, `datasets.IterableDataset`, or a dictionary of them with `split=None`.

    Raises:
        OSError: if a file is missing or damaged.
        ValueError: for a name of a file that leads out of the folder, a `name`, or a split that is not there.
    """
    if name is not None:
        raise ValueError(f"{folder} was made by `save_to_disk` and holds one dataset, got `name` {name!r}. Drop it.")
    _check_saved(folder)
    try:
        saved = load_from_disk(str(folder))
    except Exception as error:  # what the files hold is anybody's
        raise OSError(
            f"The dataset in {str(folder)!r} must be whole, got: {str(error).strip()}. Save it again."
        ) from error
    # A dataset that never was part of others has no split.
    splits = dict(saved) if isinstance(saved, dict) else {str(saved.split or "train"): saved}
    if streaming:
        splits = {key: dataset.to_iterable_dataset() for key, dataset in splits.items() if len(dataset)}
    if split is None:
        return splits
    if split not in splits:
        raise ValueError(
            f"`split` must be one of {', '.join(splits)} or `None`, which {str(folder)!r} holds, got {split!r}."
        )
    return splits[split]


def _check_saved(folder: Path) -> None:
    """Check that what `save_to_disk` has written names no files outside the folder, which would be read."""
    try:
        parts = [""]
        if path_inside(folder, _SPLITS_NAME).is_file():
            parts = [f"{split}/" for split in _read_json(folder / _SPLITS_NAME)["splits"]]
        for part in parts:
            path_inside(folder, f"{part}{_INFO_NAME}")
            state = path_inside(folder, f"{part}{_STATE_NAME}")
            names = [file["filename"] for file in _read_json(state)["_data_files"]] if state.is_file() else []
            for name in names:
                check_file_place(path_inside(folder, f"{part}{name}"), "Save the dataset again.")
                path_inside(folder / part, name)
    except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise OSError(f"The dataset in {str(folder)!r} must be whole, got: {error!r}. Save it again.") from error


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
