"""`load_trajectories`: datasets of trajectories from a folder or the Hub, checked."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    IterableDataset,
    IterableDatasetDict,
    load_dataset,
    load_from_disk,
)
from huggingface_hub import hf_hub_download
from huggingface_hub.constants import ENDPOINT

from ..files import check_file_place, path_inside, problem_of_name
from ..names import Name
from .manifest import MANIFEST_NAME, read_manifest, shards_by_split
from .prompts import has_texts
from .schema import (
    EMPTY,
    RESPONSE_COLUMNS,
    check_columns,
    check_dataset,
    check_record,
    check_response,
    check_responses,
)
from .sources import load_source


UNFINISHED_NAME = ".unfinished"
# Which files `save_to_disk` leaves for one dataset, and for several splits.
_STATE_NAME, _INFO_NAME, _SPLITS_NAME = "state.json", "dataset_info.json", "dataset_dict.json"
_HOMEPAGE = re.compile(rf"{re.escape(ENDPOINT)}/datasets/([^/]+(?:/[^/]+)?)")
MAKE_ANEW = "Delete it and run the same collection again: only that shard is made anew."


def load_trajectories(
    path: str | Path,
    split: str | None = "train",
    *,
    name: str | None = None,
    streaming: bool = False,
    revision: str | None = None,
    token: str | None = None,
    allow_incomplete: bool = False,
) -> Dataset | DatasetDict | IterableDataset | IterableDatasetDict:
    """
    Load a dataset of trajectories, or of responses alone, and check that it is one.

    The columns are always checked. Every row is too: at once by default, and with `streaming=True` as it comes. The
    shards of a collection are compared with its manifest first, with `streaming=True` by their sizes alone, so that a
    damaged one is found before it is used.

    Args:
        path (`str` or `pathlib.Path`): the output folder of a `TrajectoryBuilder`, a folder made by `save_to_disk`, or
            the id of a dataset on the Hub.
        split (`str`, *optional*): which part: `"train"`, `"test"`, or a slice such as `"train[:100]"`. `None` loads
            all as a dictionary.
        name (`str`, *optional*): which of several configurations.
        streaming (`bool`): whether to read rows when they are asked for, instead of all at once.
        revision (`str`, *optional*): branch, tag or commit of the Hub repository.
        token (`str`, *optional*): access token for the Hub; by default the stored one.
        allow_incomplete (`bool`): whether to load what there is of an unfinished collection, instead of refusing it.

    Returns:
        `datasets.Dataset`, or `datasets.IterableDataset` with `streaming=True`, or a dictionary of them with
        `split=None`.

    Raises:
        OSError: if there is no such folder or dataset, the Hub cannot be reached, or a shard is missing or damaged.
        ValueError: if it holds neither trajectories of one block size nor responses as tokens, the collection is
            unfinished, there is no such split or configuration, or an argument is given that only the other kind of
            `path` takes.
    """
    return _check_all(_load(path, split, name, streaming, revision, token, allow_incomplete))


def load_records(path: str, split: str, name: str | None = None, revision: str | None = None) -> Any:
    """Load what can be trained on: as `load_trajectories`, or prompts and responses as text, also from a file."""
    if Path(path).is_file():
        Name.find(path).check_hub_options(revision, None)
        loaded = load_source(path, name, split, "trajectories")
    else:
        loaded = _load(path, split, name, revision=revision)
    return loaded if has_texts(loaded.column_names) else _check_all(loaded)


def _load(
    path: str | Path,
    split: str | None,
    name: str | None,
    streaming: bool = False,
    revision: str | None = None,
    token: str | None = None,
    allow_incomplete: bool = False,
) -> Any:
    found = Name.find(path)
    found.check("path", "dataset")
    folder = found.path
    if folder is not None:
        found.check_hub_options(revision, token)
        if any((folder / file).is_file() for file in (_STATE_NAME, _SPLITS_NAME)):
            return _load_saved(folder, split, name, streaming)
        return _load_output(_choose(folder, name), split, streaming, allow_incomplete)
    return _load_from_hub(found.text, split, name, streaming, revision, token)


def _check_all(loaded: Any) -> Any:
    if not isinstance(loaded, dict):
        return _check(loaded)
    if all(isinstance(one, Dataset) and not len(one) for one in loaded.values()):
        raise ValueError(EMPTY)
    # A small dataset may have no row in one of its splits.
    checked = {key: one if isinstance(one, Dataset) and not len(one) else _check(one) for key, one in loaded.items()}
    is_stream = any(isinstance(one, IterableDataset) for one in checked.values())
    return IterableDatasetDict(checked) if is_stream else DatasetDict(checked)


def _check(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    if isinstance(dataset, Dataset):
        if _has_responses_alone(dataset.column_names):
            check_responses(dataset)
        else:
            check_columns(dataset.features)
            check_dataset(dataset)
        return dataset
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(EMPTY)
    if _has_responses_alone(first):
        return dataset.map(partial(_check_row, check=check_response), features=dataset.features)
    if dataset.features is not None:
        check_columns(dataset.features)
    check = partial(check_record, block_size=check_record(first))
    return dataset.map(partial(_check_row, check=check), features=dataset.features)


def _has_responses_alone(columns: Collection[str]) -> bool:
    return "states" not in columns and all(name in columns for name in RESPONSE_COLUMNS)


def _check_row(record: Mapping[str, Any], check: Callable[[Mapping[str, Any]], object]) -> dict[str, Any]:
    check(record)
    return {}  # nothing to change


# --- the output of a builder ------------------------------------------------------------------------------------


def _choose(folder: Path, name: str | None) -> Path:
    """The folder of a configuration: the default one lies at the top, as in a repository on the Hub."""
    chosen = folder if name in (None, "default") else path_inside(folder, name)
    if os.path.lexists(chosen / MANIFEST_NAME) or (chosen / UNFINISHED_NAME).is_dir():
        return chosen
    others = sorted(path.parent.name for path in folder.glob(f"*/{MANIFEST_NAME}"))
    if others:
        raise ValueError(f"`name` must be one of {', '.join(others)}, which {str(folder)!r} holds, got {name!r}.")
    raise FileNotFoundError(
        f"A folder of trajectories must hold `{MANIFEST_NAME}` of `TrajectoryBuilder`, or be made by `save_to_disk`, "
        f"got {str(chosen)!r}. Check the name; other files can be loaded with `datasets.load_dataset`."
    )


def _load_output(
    folder: Path, split: str | None, streaming: bool, allow_incomplete: bool
) -> Dataset | IterableDataset | dict[str, Any]:
    """What `TrajectoryBuilder` has written."""
    manifest = _read_manifest(folder, allow_incomplete)
    check_shards(folder, manifest, contents=not streaming)
    if "::" in str(folder.absolute()):
        raise ValueError(
            f"`datasets` reads no files below a folder with `::` in its name, got {str(folder)!r}. Rename it."
        )
    shards = manifest["shards"]
    with_rows = {  # `datasets` cannot read splits without rows, and not every file without rows
        part: [path_inside(folder, shard) for shard in names if shards[shard]["records"]]
        for part, names in shards_by_split(manifest).items()
    }
    empty = [part for part, paths in with_rows.items() if not paths]
    # It takes names as patterns, which may fit files of other folders too.
    files = {part: [glob.escape(str(path)) for path in paths] for part, paths in with_rows.items() if paths}
    if split in empty or not files:
        raise ValueError(EMPTY)
    features = _common_features([path for paths in with_rows.values() for path in paths])
    # Datasets are converted into a cache whose key holds the names and times of the files. With what is in them in the
    # key too, new shards can never be mistaken for old ones.
    contents = "".join(f"{shard} {shards[shard].get('sha256')}\n" for shard in sorted(shards))
    key = f"trajectories-{hashlib.sha256(contents.encode()).hexdigest()[:16]}"
    loaded = load_dataset("parquet", key, data_files=files, features=features, split=split, streaming=streaming)
    if split is None and not streaming:
        nothing: dict[str, list[Any]] = {column: [] for column in features}
        loaded = {**loaded, **{part: Dataset.from_dict(nothing, features=features) for part in empty}}
    return loaded


def _read_manifest(folder: Path, allow_incomplete: bool) -> dict[str, Any]:
    if not (folder / MANIFEST_NAME).is_file() and (folder / UNFINISHED_NAME).is_dir():
        raise ValueError(
            f"{str(folder)!r} is an unfinished collection of which no shard is done yet. Run the same `build` or "
            "`cllm collect` again, which finishes it."
        )
    manifest = read_manifest(folder)
    if not manifest.get("complete") and not allow_incomplete:
        raise ValueError(
            f"{describe_unfinished(folder, manifest)} Or pass `allow_incomplete=True` to load what there is."
        )
    return manifest


def _common_features(files: list[Path]) -> Features:
    """The columns that all shards have."""
    common: Features | None = None
    for file in files:
        try:
            features = Features.from_arrow_schema(pq.read_schema(file))
        except (OSError, pa.ArrowInvalid) as error:
            raise OSError(
                f"Shard {str(file)!r} must be a Parquet file, got: {str(error).strip()}. {MAKE_ANEW}"
            ) from error
        if common is not None and features != common:
            raise ValueError(
                f"All shards must have the same columns, got {', '.join(features)} in {str(file)!r}, and "
                f"{', '.join(common)} in those before it. Build the dataset again into a new folder."
            )
        common = features
    assert common is not None
    return common


def describe_unfinished(folder: Path, manifest: Mapping[str, Any]) -> str:
    """Say that a collection is unfinished, and how to finish it."""
    count = manifest.get("prompts", {}).get("count", "?")
    return (
        f"{str(folder)!r} is an unfinished collection: {manifest.get('prompts_done', '?')} of {count} prompts are "
        "done. Run the same `build` or `cllm collect` again, which finishes it."
    )


def check_shards(folder: Path, manifest: Mapping[str, Any], contents: bool = True) -> None:
    """
    Compare the shards of a folder with its manifest: by what is in them, or by their sizes alone. Those without
    records may be missing, as they need not be published.

    Raises:
        OSError: for the first shard that is missing or differs, with the way to make it anew.
    """
    for name, entry in manifest["shards"].items():
        file = path_inside(folder, name)
        check_file_place(file, MAKE_ANEW)
        if not file.is_file():
            if entry.get("records") == 0:
                continue
            raise FileNotFoundError(
                f"Shard {name} of {str(folder)!r} must be there, as `{MANIFEST_NAME}` says, but is missing. Run the "
                "same collection again: only that shard is made anew."
            )
        size, problem = file.stat().st_size, None
        if entry.get("bytes") not in (None, size):
            problem = f"has {size:,} bytes instead of {entry['bytes']:,}"
        elif contents and entry.get("sha256") not in (None, _sha256(file)):
            problem = "holds other bytes than were written"
        if problem:
            raise OSError(f"Shard {name} of {str(folder)!r} {problem}, as `{MANIFEST_NAME}` says. {MAKE_ANEW}")


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while part := opened.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


# --- what `save_to_disk` has written ----------------------------------------------------------------------------


def _load_saved(
    folder: Path, split: str | None, name: str | None, streaming: bool
) -> Dataset | IterableDataset | dict[str, Any]:
    """Load a folder if it names no files outside itself; `split` and `streaming` as in `load_trajectories`."""
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


# --- the Hub ----------------------------------------------------------------------------------------------------


def find_manifest(path: str | Path, name: str | None = None, revision: str | None = None) -> dict[str, Any]:
    """
    Read the manifest of a dataset in a folder or on the Hub, or of one of its configurations.

    Returns:
        `dict`: the manifest; empty if there is none, as in what `save_to_disk` has written.

    Raises:
        ValueError: if there is a file of that name which is no manifest.
    """
    inner, hub_id = "" if name in (None, "default") else f"{name}/", Name.find(path).hub_id
    if inner and problem_of_name(name) is not None:
        raise ValueError(f"`name` must be that of a configuration, got {name!r}, {problem_of_name(name)}.")
    try:
        if hub_id is None:
            return read_manifest(path_inside(Path(path), str(name)) if inner else Path(path))
        file = hf_hub_download(hub_id, f"{inner}{MANIFEST_NAME}", repo_type="dataset", revision=revision)
        return read_manifest(Path(file).parent)
    except OSError:
        return {}


def _load_from_hub(
    repo_id: str, split: str | None, name: str | None, streaming: bool, revision: str | None, token: str | None
) -> Dataset | IterableDataset | dict[str, Any]:
    try:
        loaded = load_dataset(repo_id, name, split=split, streaming=streaming, revision=revision, token=token)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"`path` must be a folder, or the id of a dataset on the Hub, got {repo_id!r}. There is no such folder, "
            f"and of the Hub: {_first_line(error)} Check the name; for a private dataset run `hf auth login` or pass "
            "`token`."
        ) from error
    except ConnectionError as error:
        raise ConnectionError(
            f"`path` must be a folder, or the id of a dataset on the Hub, got {repo_id!r}. There is no such folder, "
            f"and the Hub did not answer: {_first_line(error)} Check the name and the network, and that "
            "`HF_HUB_OFFLINE` is not set."
        ) from error
    for one in loaded.values() if isinstance(loaded, dict) else [loaded]:
        one.info.homepage = f"{ENDPOINT}/datasets/{repo_id}"
    return loaded


def hub_id_of(dataset: Any) -> str | None:
    """The id on the Hub of what `load_trajectories` has loaded from there, or of a part of it; else `None`."""
    found = _HOMEPAGE.fullmatch(getattr(getattr(dataset, "info", None), "homepage", None) or "")
    return found[1] if found else None


def _first_line(error: Exception) -> str:
    line = str(error).strip().splitlines()[0]
    return line if line.endswith(".") else f"{line}."
