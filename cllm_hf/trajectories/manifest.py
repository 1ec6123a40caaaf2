"""`manifest.json`: what a folder of trajectories holds, and how it was made."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..files import replace_file


MANIFEST_NAME = "manifest.json"
FORMAT = 1
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
    path = folder / MANIFEST_NAME
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"A folder of trajectories must hold `{MANIFEST_NAME}`, got none in {str(folder)!r}. Pass the "
            "`output_dir` of a collection."
        ) from error
    except OSError as error:
        raise OSError(f"{path} must be readable, got: {error.strerror}. Change its permissions.") from error
    except ValueError as error:  # no JSON, or no text at all
        raise ValueError(f"{path} must be JSON, got: {error}. Restore it, or collect into another folder.") from error
    version = manifest.get("format") if isinstance(manifest, dict) else None
    if isinstance(version, int) and version > FORMAT:
        raise ValueError(
            f"{path} must have `format` {FORMAT} or older, got {version}. It was written by a newer version of this "
            "package: update `cllm_hf`."
        )
    shards = manifest.get("shards") if isinstance(version, int) else None
    entries = shards.values() if isinstance(shards, dict) else [None]
    if not all(isinstance(entry, dict) and isinstance(entry.get("records"), int) for entry in entries):
        raise ValueError(
            f"{path} must be the manifest of a trajectory dataset, with entries `format` and `shards`, got another "
            "file of that name. Pass the `output_dir` of a collection."
        )
    return manifest


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
    content = json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    replace_file(folder / MANIFEST_NAME, content.encode(), unfinished)


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
