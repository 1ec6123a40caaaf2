"""
`manifest.json`: what a folder of trajectories holds and how it was made, and the fingerprints in it by which a model
and a tokenizer are known again, wherever they were loaded from.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from huggingface_hub import try_to_load_from_cache
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import find_adapter_config_file

from .._host import attention_implementation
from ..files import path_inside
from ..names import Name, is_absolute
from .schema import open_lists


MANIFEST_NAME = "manifest.json"
FORMAT = 1
# What may stand for a shard: names of other files are not to be read, uploaded or deleted by what a manifest says.
SHARD_NAME = re.compile(r"data/[A-Za-z0-9_]+-[0-9]+-of-[0-9]+\.parquet")
# What else the parts of a manifest hold, those of `_NEEDED` in all that this package has written.
_KINDS: dict[type, tuple[str, ...]] = {
    dict: ("made_with", "model", "tokenizer", "prompts", "options", "options.cleaning", "counts", "statistics"),
    bool: ("complete",),
    int: ("prompts_done", "model.num_parameters", "prompts.count", "options.block_size"),
    str: (
        *("model.name", "model.revision", "model.architecture", "model.dtype", "model.attention"),
        *("model.fingerprint", "tokenizer.name", "prompts.source", "prompts.license"),
    ),
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
# What decides nothing of what a model says, or is described by an entry of its own.
_INCIDENTAL = {"architectures", "dtype", "transformers_version", "use_cache"}
_SAMPLES = 256  # values of a weight
# What a training reads of a record; the order tells which one it is.
_TRAINED = ("prompt_ids", "response_ids", "states", "augmented_states", "label_ids")
_ROWS_AT_ONCE = 200
_RESTORE = "Restore it, or collect into another folder."


# --- reading and writing ----------------------------------------------------------------------------------------


def read_manifest(folder: Path) -> dict[str, Any]:
    """
    Read the manifest of a folder that `TrajectoryBuilder` has written.

    Raises:
        OSError: if there is none, or it cannot be read.
        ValueError: if it is not JSON, not a manifest of trajectories, or written by a newer version of this package.
    """
    path = path_inside(folder, MANIFEST_NAME)
    try:
        if path.exists() and not path.is_file():  # reading a pipe would wait for ever
            raise OSError(0, "it is no regular file")
        manifest = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_duplicates)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"A folder of trajectories must hold `{MANIFEST_NAME}`, got none in {str(folder)!r}. Pass the "
            "`output_dir` of a collection."
        ) from error
    except OSError as error:
        raise OSError(f"{path} must be readable, got: {error.strerror}. Change its permissions.") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON, got: {error}. {_RESTORE}") from error
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
    for name in manifest["shards"]:
        path_inside(folder, name)  # a link may stand there
    return manifest


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for number, (name, _) in enumerate(pairs) if name in dict(pairs[:number]))
        raise ValueError(f"an object with the entry {twice!r} twice")
    return found


def find_problem(manifest: Any, is_whole: bool = False) -> str | None:
    """What is wrong with a manifest, which may be anybody's; `is_whole` if it must have all that a card tells."""
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
    for kind, name in ((kind, name) for kind, names in _KINDS.items() for name in names):
        value = _value_of(manifest, name)
        if name == "options.block_size" and value is None and has_no_states(manifest):
            continue
        if not _is(kind, value) and (value is not None or (is_whole and name in _NEEDED)):
            return f"`{name}` {value!r}"
    for part, kind in (("counts", int), ("made_with", str), ("statistics", dict)):
        wrong = [name for name, value in (manifest.get(part) or {}).items() if not _is(kind, value)]
        if wrong:
            return f"`{part}.{wrong[0]}` {manifest[part][wrong[0]]!r}"
    return None


def has_no_states(manifest: Mapping[str, Any]) -> bool:
    """Whether a collection is of responses alone."""
    return _value_of(manifest, "options.responses_only") is True


def check_whole(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raise a `ValueError` unless a manifest has all that a collection goes on with and a card tells."""
    problem = find_problem(manifest, is_whole=True)
    if problem is not None:
        raise ValueError(
            f"`{MANIFEST_NAME}` of {str(folder)!r} must hold all that a collection writes there, got {problem}. "
            f"{_RESTORE}"
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
    """The same with `path/to/NAME` for every name that is spelled as a path: folders of this machine tell nobody."""

    def shown(name: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {inner: shown(inner, part) for inner, part in value.items()}
        if isinstance(value, list):
            return [shown(name, part) for part in value]
        # Others, such as a branch, may hold a `/` or two and be no path.
        may_be_path = isinstance(value, str) and (name in ("name", "source") or is_absolute(value))
        return Name.recorded(value).for_others if may_be_path else value

    return {name: value if name == "shards" else shown(name, value) for name, value in manifest.items()}


def render_manifest(manifest: Mapping[str, Any]) -> bytes:
    """The content of the file; the same manifest gives the same bytes."""
    try:
        return (json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # a name that is no text, such as that of a folder in another encoding, takes escapes
        return (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode()


def shards_by_split(manifest: Mapping[str, Any]) -> dict[str, list[str]]:
    """Names of the shards of each split of a collection in their order, `"train"` first."""
    found: dict[str, list[str]] = {}
    for name in sorted(manifest["shards"], key=lambda name: (not name.startswith("data/train-"), name)):
        split = name.removeprefix("data/").split("-")[0]  # as `SHARD_NAME` has it
        found.setdefault(split, []).append(name)
    return found


def records_by_split(manifest: Mapping[str, Any]) -> dict[str, int]:
    """Records of each split of a collection, `"train"` first."""
    shards = manifest["shards"]
    return {
        split: sum(shards[name]["records"] for name in names) for split, names in shards_by_split(manifest).items()
    }


# --- the same collection, the same model ------------------------------------------------------------------------


def describe_difference(earlier: Mapping[str, Any], present: Mapping[str, Any]) -> str:
    """Say in what two collections differ that decides which records come out; nothing if in nothing."""
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


def describe_model(model: PreTrainedModel, revision: str | None = None) -> dict[str, Any]:
    """
    What a manifest says of a model, with the layers of an adapter in it or without, that was loaded from a revision.
    `name` and `revision` are for people; the rest decides what the model says.
    """
    return {
        "name": model.name_or_path or None,
        "revision": find_commit(model.name_or_path or "", revision),
        "architecture": type(model).__name__,
        "num_parameters": model.num_parameters(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": attention_implementation(model.config.get_text_config()),
        "fingerprint": fingerprint_weights(model),
    }


def find_commit(name: str, revision: str | None = None) -> str | None:
    """
    The commit of a model that was loaded from the Hub, in the Hub's cache; the revision as it is if the cache does not
    know it. For a folder there is none.
    """
    hub_id = Name.find(name).hub_id
    if hub_id is None:
        return None
    for file in ("config.json", "adapter_config.json"):
        cached = try_to_load_from_cache(hub_id, file, revision=revision)
        if isinstance(cached, str):
            return Path(cached).parent.name
    return revision


def recorded_model(dataset: str, made_by: Mapping[str, Any]) -> tuple[str, str | None]:
    """
    Folder or Hub id of the model that made a dataset, by what its manifest says of it, and its commit on the Hub.
    There is none for an adapter, whose manifest has that of the model below it.

    Raises:
        OSError: if the model was in a folder that is not there.
        ValueError: if the manifest names no model.
    """
    name = made_by.get("name")
    if not name:
        raise ValueError(f"{dataset} does not say which model it was made by. Pass it as `--model`.")
    # A published manifest has no folders: what it names then is spelled as a path, and nowhere.
    if Name.find(name).is_missing or (Name.recorded(name).path is not None and not Path(name).exists()):
        raise OSError(f"{dataset} was made by the model {name}, which is not there. Pass it as `--model`.")
    return name, made_by.get("revision") if find_adapter_config_file(name) is None else None


def describe_tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What a manifest says of a tokenizer."""
    return {"name": tokenizer.name_or_path or None, "fingerprint": fingerprint_tokenizer(tokenizer)}


@torch.no_grad()
def fingerprint_weights(model: PreTrainedModel) -> str:
    """
    Hash what decides what a model says: its config, which adapters act how strongly, and some values of every weight.

    Training changes all weights, and reading them whole would take long. Weights that are offloaded to disk count by
    name and shape.
    """
    digest = hashlib.sha256()
    config = model.config.get_text_config().to_dict()
    kept = {name: value for name, value in config.items() if not _is_incidental(name)}
    digest.update(json.dumps(kept, sort_keys=True, default=str).encode())
    for name, layer in model.named_modules():
        if hasattr(layer, "active_adapters") and not isinstance(layer, PreTrainedModel):
            acting = [name, layer.active_adapters, layer.disable_adapters, sorted(layer.scaling.items())]
            digest.update(json.dumps(acting, default=str).encode())
    for name, weight in sorted([*model.named_parameters(), *model.named_buffers()], key=lambda item: item[0]):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}\n".encode())
        if weight.device.type != "meta":
            values = weight.detach().flatten()
            values = values[:: max(1, len(values) // _SAMPLES)]
            digest.update(values.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _is_incidental(name: str) -> bool:
    return name.startswith("_") or name.endswith("_token_id") or name in _INCIDENTAL


def fingerprint_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash what a tokenizer makes of text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else sorted(tokenizer.get_vocab().items())
    if isinstance(rules, dict):  # a call with padding or truncation leaves them there
        rules = {name: value for name, value in rules.items() if name not in ("padding", "truncation")}
    parts = [
        rules,
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        tokenizer.chat_template,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def fingerprint_records(dataset: Dataset) -> str:
    """Hash what a training reads of records, in their order, whatever the types of integers and lists are."""
    digest = hashlib.sha256()
    names = [name for name in _TRAINED if name in dataset.column_names]
    digest.update(json.dumps(names).encode())
    for table in dataset.with_format("arrow").select_columns(names).iter(batch_size=_ROWS_AT_ONCE):
        for column in table.columns:
            for level in open_lists(column):
                digest.update(_to_bytes(level))
    return digest.hexdigest()


def _to_bytes(array: Any) -> bytes:
    if not pa.types.is_integer(array.type):  # nothing that this package has written
        return json.dumps(array.to_pylist(), default=str).encode()
    return np.asarray(pc.fill_null(array.cast(pa.int64()), -1), dtype="<i8").tobytes()
