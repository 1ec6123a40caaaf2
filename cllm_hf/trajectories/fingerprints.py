"""Numbers by which a model and a tokenizer are known again, wherever they were loaded from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
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
from ..names import Name


_SAMPLES = 256
_ROWS = 200  # at a time
# What a training reads of a record; the order tells which one it is.
_TRAINED = ("prompt_ids", "response_ids", "states", "augmented_states", "label_ids")
_INCIDENTAL = {"architectures", "dtype", "transformers_version", "use_cache"}


def describe_model(model: PreTrainedModel, revision: str | None = None) -> dict[str, Any]:
    """
    Describe a model for a manifest.

    Args:
        model (`transformers.PreTrainedModel`): the model; an adapter's layers may be in it.
        revision (`str`, *optional*): branch, tag or commit that it was loaded from, if not the main branch.

    Returns:
        `dict`: ready for JSON. `name` and `revision` are for people; the rest decides what the model says.
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
    Find the commit of a model that was loaded from the Hub, in the Hub's cache.

    Args:
        name (`str`): Hub id of the model; for a folder there is no commit.
        revision (`str`, *optional*): branch, tag or commit; by default the main branch.

    Returns:
        `str` or `None`: the commit, or the revision as it is if the cache does not know it.
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
    Look up which model made a dataset.

    Args:
        dataset (`str`): name of the dataset, for errors.
        made_by (`Mapping[str, Any]`): what its manifest says of the model; see `describe_model`.

    Returns:
        `tuple[str, str | None]`: folder or Hub id of the model, and its commit on the Hub. There is none for an
        adapter, whose manifest has that of the model below it.

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
    """
    Describe a tokenizer for a manifest.

    Args:
        tokenizer (`transformers.PreTrainedTokenizerBase`): the tokenizer.

    Returns:
        `dict`: ready for JSON.
    """
    return {"name": tokenizer.name_or_path or None, "fingerprint": fingerprint_tokenizer(tokenizer)}


@torch.no_grad()
def fingerprint_weights(model: PreTrainedModel) -> str:
    """
    Hash what decides what a model says: its config, which adapters act how strongly, and some values of every weight.

    Training changes all weights, and reading them whole would take long.

    Args:
        model (`transformers.PreTrainedModel`): the model. Weights that are offloaded to disk count by name and shape.

    Returns:
        `str`: hexadecimal.
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
    """Whether an entry of a config decides nothing here, or is described by an entry of its own."""
    return name.startswith("_") or name.endswith("_token_id") or name in _INCIDENTAL


def fingerprint_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """
    Hash what a tokenizer makes of text.

    Args:
        tokenizer (`transformers.PreTrainedTokenizerBase`): the tokenizer.

    Returns:
        `str`: hexadecimal.
    """
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
    """
    Hash what a training reads of the records of a dataset, in their order.

    Args:
        dataset (`datasets.Dataset`): trajectories.

    Returns:
        `str`: hexadecimal; the same whatever the types of integers and lists are.
    """
    digest = hashlib.sha256()
    names = [name for name in _TRAINED if name in dataset.column_names]
    digest.update(json.dumps(names).encode())
    for table in dataset.with_format("arrow").select_columns(names).iter(batch_size=_ROWS):
        for column in table.columns:
            _update(digest, column.combine_chunks())
    return digest.hexdigest()


def _update(digest: Any, array: Any) -> None:
    """Lengths of lists from the outside in, then what is in them."""
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type.value_type)
    while isinstance(array, (pa.ListArray, pa.LargeListArray, pa.FixedSizeListArray)):
        digest.update(_to_bytes(pc.list_value_length(array)))
        array = pc.list_flatten(array)
    digest.update(_to_bytes(array))


def _to_bytes(array: Any) -> bytes:
    if not pa.types.is_integer(array.type):  # nothing that this package has written
        return json.dumps(array.to_pylist(), default=str).encode()
    return np.asarray(pc.fill_null(array.cast(pa.int64()), -1), dtype="<i8").tobytes()
