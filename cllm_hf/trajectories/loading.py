"""`load_trajectories`: datasets of trajectories from a folder or the Hub, checked."""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import (
    Dataset,
    DatasetDict,
    Features,
    IterableDataset,
    IterableDatasetDict,
    load_dataset,
)
from huggingface_hub import hf_hub_download
from huggingface_hub.constants import ENDPOINT

from ..files import check_file_place, path_inside, problem_of_name
from ..names import Name
from .manifest import MANIFEST_NAME, SHARD_NAME, read_manifest
from .saved import is_saved, load_saved
from .schema import check_columns, check_dataset, check_record


UNFINISHED_NAME = ".unfinished"
_HOMEPAGE = re.compile(rf"{re.escape(ENDPOINT)}/datasets/([^/]+(?:/[^/]+)?)")
_EMPTY = "The trajectory dataset is empty. Build it from more prompts, or look at its drop counts."


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
    Load a dataset of trajectories and check that it is one.

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
        ValueError: if it does not hold trajectories of one block size, the collection is unfinished, there is no such
            split or configuration, or an argument is given that only the other kind of `path` takes.
    """
    found = Name.find(path)
    found.check("path", "dataset")
    folder = found.path
    if folder is not None:
        found.check_hub_options(revision, token)
        if is_saved(folder):
            loaded = load_saved(folder, split, name, streaming)
        else:
            loaded = _load_output(_choose(folder, name), split, streaming, allow_incomplete)
    else:
        loaded = _load_from_hub(found.text, split, name, streaming, revision, token)
    if not isinstance(loaded, dict):
        return _check(loaded)
    if all(isinstance(one, Dataset) and not len(one) for one in loaded.values()):
        raise ValueError(_EMPTY)
    # A small dataset may have no row in one of its splits.
    checked = {key: one if isinstance(one, Dataset) and not len(one) else _check(one) for key, one in loaded.items()}
    return IterableDatasetDict(checked) if streaming else DatasetDict(checked)


def _check(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    if isinstance(dataset, Dataset):
        check_columns(dataset.features)
        check_dataset(dataset)
        return dataset
    if dataset.features is not None:
        check_columns(dataset.features)
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(_EMPTY)
    return dataset.map(_RowCheck(check_record(first)), features=dataset.features)


class _RowCheck:
    """Lets the rows of a stream pass that are trajectories of one block size."""

    def __init__(self, block_size: int):
        self.block_size = block_size

    def __call__(self, record: Mapping[str, Any]) -> dict[str, Any]:
        check_record(record, self.block_size)
        return {}  # nothing to change


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
    files, empty = _files_by_split(folder, manifest)
    if split in empty or not files:
        raise ValueError(_EMPTY)
    features = _common_features([path_inside(folder, name) for name in sorted(shards) if shards[name]["records"]])
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


def describe_unfinished(folder: Path, manifest: Mapping[str, Any]) -> str:
    """
    Say that a collection is unfinished, and how to finish it.

    Args:
        folder (`pathlib.Path`): its folder.
        manifest (`Mapping[str, Any]`): its manifest.

    Returns:
        `str`: two sentences.
    """
    count = manifest.get("prompts", {}).get("count", "?")
    return (
        f"{str(folder)!r} is an unfinished collection: {manifest.get('prompts_done', '?')} of {count} prompts are "
        "done. Run the same `build` or `cllm collect` again, which finishes it."
    )


def find_manifest(path: str | Path, name: str | None = None, revision: str | None = None) -> dict[str, Any]:
    """
    Read the manifest of a dataset of trajectories.

    Args:
        path (`str` or `pathlib.Path`): folder or Hub id of the dataset.
        name (`str`, *optional*): which of several configurations.
        revision (`str`, *optional*): branch, tag or commit of the Hub repository.

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


def check_shards(folder: Path, manifest: Mapping[str, Any], contents: bool = True) -> None:
    """
    Compare the shards of a collection with its manifest.

    Args:
        folder (`pathlib.Path`): the folder of the manifest.
        manifest (`Mapping[str, Any]`): the manifest. Shards without records may be missing: they need not be
            published.
        contents (`bool`): whether to read all shards and compare what is in them, not just their sizes.

    Raises:
        OSError: for the first shard that is missing or differs, with the way to make it anew.
    """
    for name, entry in manifest["shards"].items():
        file = path_inside(folder, name)
        check_file_place(file, "Remove it and run the same collection again: only that shard is made anew.")
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
            raise OSError(
                f"Shard {name} of {str(folder)!r} {problem}, as `{MANIFEST_NAME}` says. Delete it and run the same "
                "collection again: only that shard is made anew."
            )


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while part := opened.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def records_by_split(manifest: Mapping[str, Any]) -> dict[str, int]:
    """
    Count the records of each split of a collection.

    Args:
        manifest (`Mapping[str, Any]`): its manifest.

    Returns:
        `dict[str, int]`: by the name of the split, `"train"` first.
    """
    counts: dict[str, int] = {}
    for name in sorted(manifest["shards"], key=lambda name: (not _split_of(name) == "train", name)):
        counts[_split_of(name)] = counts.get(_split_of(name), 0) + manifest["shards"][name]["records"]
    return counts


def _split_of(shard: str) -> str:
    found = SHARD_NAME.fullmatch(shard)
    assert found is not None  # as `read_manifest` has seen
    return found[1]


def _files_by_split(folder: Path, manifest: Mapping[str, Any]) -> tuple[dict[str, list[str]], list[str]]:
    """Shards that have records, by split, and the splits that have none."""
    # The host cannot read splits without rows, and not every file without rows.
    files: dict[str, list[str]] = {}
    empty = []
    for split, records in records_by_split(manifest).items():
        if not records:
            empty.append(split)
            continue
        shards = sorted(name for name in manifest["shards"] if _split_of(name) == split)
        # `datasets` takes them as patterns, which may fit files of other folders too.
        paths = [path_inside(folder, name) for name in shards if manifest["shards"][name]["records"]]
        files[split] = [glob.escape(str(path)) for path in paths]
    return files, empty


def _common_features(files: list[Path]) -> Features:
    """The columns that all shards have."""
    import pyarrow
    from pyarrow import parquet

    common: Features | None = None
    for file in files:
        try:
            features = Features.from_arrow_schema(parquet.read_schema(file))
        except (OSError, pyarrow.ArrowInvalid) as error:
            raise OSError(
                f"Shard {str(file)!r} must be a Parquet file, got: {str(error).strip()}. Delete it and run the same "
                "collection again: only that shard is made anew."
            ) from error
        if common is not None and features != common:
            raise ValueError(
                f"All shards must have the same columns, got {', '.join(features)} in {str(file)!r}, and "
                f"{', '.join(common)} in those before it. Build the dataset again into a new folder."
            )
        common = features
    assert common is not None
    return common


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
    """
    Where on the Hub `load_trajectories` has found a dataset.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): the dataset, or a part of it.

    Returns:
        `str`: its id, or `None` if it is not from the Hub.
    """
    found = _HOMEPAGE.fullmatch(getattr(getattr(dataset, "info", None), "homepage", None) or "")
    return found[1] if found else None


def _first_line(error: Exception) -> str:
    line = str(error).strip().splitlines()[0]
    return line if line.endswith(".") else f"{line}."
