"""`manifest.json`: what a folder of trajectories holds, and how it was made."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..files import path_inside, write_whole
from ..names import Name, is_absolute


MANIFEST_NAME = "manifest.json"
FORMAT = 1
# What may stand for a shard: names of other files are not to be read, uploaded or deleted by what a manifest says.
SHARD_NAME = re.compile(r"data/([A-Za-z0-9_]+)-[0-9]+-of-[0-9]+\.parquet")
# What else the parts of a manifest hold, those of `_NEEDED` in all that this package has written.
_KINDS: dict[str, type] = {
    "complete": bool,
    "prompts_done": int,
    "made_with": dict,
    "model": dict,
    "model.name": str,
    "model.revision": str,
    "model.architecture": str,
    "model.num_parameters": int,
    "model.dtype": str,
    "model.attention": str,
    "model.fingerprint": str,
    "tokenizer": dict,
    "tokenizer.name": str,
    "prompts": dict,
    "prompts.count": int,
    "prompts.source": str,
    "prompts.license": str,
    "options": dict,
    "options.block_size": int,
    "options.cleaning": dict,
    "counts": dict,
    "statistics": dict,
}
_NEEDED = (
    *("complete", "prompts_done", "made_with", "tokenizer", "prompts.count", "options.block_size", "counts"),
    *("model.architecture", "model.num_parameters", "model.dtype", "model.attention", "statistics"),
)
# These parts decide which records come out, all but the entries that say where things came from, and the size of
# batches, which one may have to change for the memory.
_COMPARED = ("model", "tokenizer", "prompts", "options")
_NOT_COMPARED = {"model.name", "model.revision", "model.num_parameters", "tokenizer.name"}
_NOT_COMPARED |= {"prompts.source", "prompts.license", "options.max_tokens_per_batch"}


def read_manifest(folder: Path) -> dict[str, Any]:
    """
    Read the manifest of a folder that `TrajectoryBuilder` has written.

    Args:
        folder (`pathlib.Path`): the folder.

    Returns:
        `dict`: the manifest.

    Raises:
        OSError: if there is none, or it cannot be read.
        ValueError: if it is not JSON, not a manifest of trajectories, or written by a newer version of this package.
    """
    path = path_inside(folder, MANIFEST_NAME)
    try:
        if path.exists() and not path.is_file() and not path.is_dir():  # reading a pipe would wait for ever
            raise OSError(0, "No regular file")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"A folder of trajectories must hold `{MANIFEST_NAME}`, got none in {str(folder)!r}. Pass the "
            "`output_dir` of a collection."
        ) from error
    except OSError as error:
        raise OSError(f"{path} must be readable, got: {error.strerror}. Change its permissions.") from error
    except ValueError as error:  # no text at all
        raise ValueError(f"{path} must be JSON, got: {error}. Restore it, or collect into another folder.") from error
    manifest = _parse(path, text)
    for name in manifest["shards"]:
        path_inside(folder, name)  # a link may stand there
    return manifest


def _parse(path: Path, text: str) -> dict[str, Any]:
    try:
        manifest = json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON, got: {error}. Restore it, or collect into another folder.") from error
    version = manifest.get("format") if isinstance(manifest, dict) else None
    if isinstance(version, int) and version > FORMAT:
        raise ValueError(
            f"{path} must have `format` {FORMAT} or older, got {version}. It was written by a newer version of this "
            "package: update `cllm_hf`."
        )
    problem = find_problem(manifest)
    if problem is not None:
        raise ValueError(
            f"{path} must be the manifest of a trajectory dataset, with entries `format` and `shards`, got {problem}. "
            "Pass the `output_dir` of a collection."
        )
    return manifest


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for number, (name, _) in enumerate(pairs) if name in dict(pairs[:number]))
        raise ValueError(f"an object with the entry {twice!r} twice")
    return found


def find_problem(manifest: Any, is_whole: bool = False) -> str | None:
    """
    Find what is wrong with a manifest, which may be anybody's.

    Args:
        manifest (`Any`): what `json.loads` gave.
        is_whole (`bool`): whether it must have everything that a card of it tells.

    Returns:
        `str`: the problem; `None` without one.
    """
    if not isinstance(manifest, dict) or not _is(int, manifest.get("format")):
        return "another file of that name"
    shards = manifest.get("shards")
    if not isinstance(shards, dict):
        return "another file of that name"
    for name, entry in shards.items():
        if not SHARD_NAME.fullmatch(name):
            return f"the shard {name!r}, which is not called `data/SPLIT-NUMBER-of-NUMBER.parquet`"
        if not _is_entry(entry):
            return f"no count, size and digest of the shard {name!r}"
    if len({name.lower() for name in shards}) < len(shards):
        return "names of shards that differ by case alone"
    for name, kind in _KINDS.items():
        value = _value_of(manifest, name)
        if not _is(kind, value) and (value is not None or (is_whole and name in _NEEDED)):
            return f"`{name}` {value!r}"
    for part, kind in (("counts", int), ("made_with", str), ("statistics", dict)):
        wrong = [name for name, value in (manifest.get(part) or {}).items() if not _is(kind, value)]
        if wrong:
            return f"`{part}.{wrong[0]}` {manifest[part][wrong[0]]!r}"
    return None


def check_whole(folder: Path, manifest: Mapping[str, Any]) -> None:
    """
    Check that a manifest has everything that a collection goes on with and a card tells.

    Args:
        folder (`pathlib.Path`): its folder.
        manifest (`Mapping[str, Any]`): what `read_manifest` gave.

    Raises:
        ValueError: if not.
    """
    problem = find_problem(manifest, is_whole=True)
    if problem is not None:
        raise ValueError(
            f"`{MANIFEST_NAME}` of {str(folder)!r} must hold all that a collection writes there, got {problem}. "
            "Restore it, or collect into another folder."
        )


def _is(kind: type, value: Any) -> bool:
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return isinstance(value, kind)


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and _is(int, entry.get("records"))
        and (entry.get("bytes") is None or _is(int, entry["bytes"]))
        and (entry.get("sha256") is None or _is(str, entry["sha256"]))
    )


def _value_of(manifest: Mapping[str, Any], name: str) -> Any:
    value: Any = manifest
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def without_folders(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """
    A manifest for others to read, without the folders of the machine where it was made, which mean nothing to them.

    Args:
        manifest (`Mapping[str, Any]`): the manifest.

    Returns:
        `dict[str, Any]`: the same, with `path/to/NAME` for every name that is spelled as a path.
    """

    def shown(name: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {inner: shown(inner, part) for inner, part in value.items()}
        if isinstance(value, list):
            return [shown(name, part) for part in value]
        # Others, such as a branch, may hold a `/` or two and be no path.
        may_be_path = isinstance(value, str) and (name in ("name", "source") or is_absolute(value))
        return Name.recorded(value).for_others if may_be_path else value

    return {name: value if name == "shards" else shown(name, value) for name, value in manifest.items()}


def write_manifest(folder: Path, manifest: Mapping[str, Any], unfinished: Path) -> None:
    """
    Write the manifest of a folder, in place of an earlier one.

    Args:
        folder (`pathlib.Path`): the folder.
        manifest (`Mapping[str, Any]`): the manifest; the same one gives the same bytes.
        unfinished (`pathlib.Path`): the file to write first, on the same disk.

    Raises:
        OSError: if it cannot be written.
    """
    write_whole(folder / MANIFEST_NAME, render_manifest(manifest), unfinished)


def render_manifest(manifest: Mapping[str, Any]) -> bytes:
    """
    The content of a `manifest.json`.

    Args:
        manifest (`Mapping[str, Any]`): the manifest; the same one gives the same bytes.

    Returns:
        `bytes`: JSON, with escapes where a name is no text, such as that of a folder in another encoding.
    """
    try:
        return (json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:
        return (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode()


def describe_difference(earlier: Mapping[str, Any], present: Mapping[str, Any]) -> str:
    """
    Say in what two collections differ that decides which records come out.

    Args:
        earlier (`Mapping[str, Any]`): the manifest of the one.
        present (`Mapping[str, Any]`): the manifest of the other, or its beginning.

    Returns:
        `str`: the differences, or nothing if both collect the same.
    """
    before, after = dict(_flatten(earlier)), dict(_flatten(present))
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    parts = []
    for name in names:
        if name.endswith(".fingerprint"):
            what = {"model": "weights of the model", "tokenizer": "rules of the tokenizer"}.get(name.split(".")[0])
            parts.append(f"other {what or 'prompts'}")
        else:
            option = name.removeprefix("options.").removeprefix("cleaning.")
            parts.append(f"`{option}` is {before.get(name)!r} there and {after.get(name)!r} here")
    return "; ".join(parts)


def _flatten(manifest: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    pending = [(name, manifest.get(name, {})) for name in _COMPARED]
    while pending:
        name, value = pending.pop(0)
        if isinstance(value, Mapping):
            pending += [(f"{name}.{key}", part) for key, part in value.items()]
        elif name not in _NOT_COMPARED:
            yield name, value
