"""Whether a checkpoint was written to its end, and holds all that a run goes on with."""

from __future__ import annotations

import json
import re
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..files import path_inside


STATE_NAME = "trainer_state.json"  # the last file that a checkpoint gets
_JSON = ("config.json", "generation_config.json", "adapter_config.json", "tokenizer.json", "tokenizer_config.json")
_TORCH = re.compile(
    r"(optimizer|scheduler|scaler|rng_state|training_args|pytorch_model|adapter_model).*\.(pt|pth|bin)"
)
_WEIGHTS = re.compile(r"(model|adapter_model|pytorch_model)\.(safetensors|bin)(\.index\.json)?|pytorch_model_fsdp.*")
_OF_DEEPSPEED = re.compile(r"global_step\d+|latest")


def find_flaw(checkpoint: str | Path) -> str | None:
    """
    Find why no run can go on from a checkpoint: a file that is missing, or cut as by a kill or a loss of power.

    Files are opened and measured, not read whole.

    Args:
        checkpoint (`str` or `pathlib.Path`): its folder.

    Returns:
        `str`: what is wrong, as in "has no optimizer.pt"; `None` if the checkpoint is whole.
    """
    folder = Path(checkpoint)
    state = _read_json(folder / STATE_NAME)
    if not isinstance(state, dict) or not isinstance(state.get("global_step"), int):
        return f"has no whole {STATE_NAME}, which is written last"
    try:
        cut = next(_find_cut(folder), None)
    except (OSError, ValueError) as error:
        return f"cannot be read ({error})"
    if cut is not None:
        return f"has a file that was cut, {cut}"
    names = {path.name for path in folder.iterdir()}
    if any(map(_OF_DEEPSPEED.fullmatch, names)):  # keeps all of this in files of its own
        return None
    # Each of several adapters has a folder.
    if not any(map(_WEIGHTS.fullmatch, names)) and not any(folder.glob("*/adapter_model.*")):
        return "has no weights"
    if holds_model_only(folder):
        return "holds no state of the optimizer: it was written with `save_only_model=True`"
    for part, file in (("optimizer", "optimizer.pt"), ("scheduler.pt",) * 2, ("rng_state", "rng_state.pth")):
        if not any(part in name for name in names):
            return f"has no {file}"
    return None


def holds_model_only(checkpoint: str | Path) -> bool:
    """
    Whether a checkpoint was written without anything to go on with, as `save_only_model=True` asks for.

    Args:
        checkpoint (`str` or `pathlib.Path`): its folder.

    Returns:
        `bool`.
    """
    names = [path.name for path in Path(checkpoint).iterdir()]
    return not any(part in name for part in ("optimizer", "scheduler.pt", "rng_state") for name in names)


def _find_cut(folder: Path) -> Iterator[str]:
    """Names of files that are not as long as they say, or cannot be what they are called."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file():
            continue
        is_whole = True
        if path.suffix == ".safetensors":
            is_whole = _is_whole_safetensors(path)
        elif _TORCH.fullmatch(path.name):
            is_whole = _is_whole_torch(path)
        elif name in _JSON:
            is_whole = _read_json(path) is not None
        elif path.name.endswith(".index.json"):
            index = _read_json(path)
            shards = index.get("weight_map") if isinstance(index, dict) else None
            is_whole = isinstance(shards, dict) and all(_has(path.parent, shard) for shard in shards.values())
        if not is_whole:
            yield name


def _has(folder: Path, name: Any) -> bool:
    return path_inside(folder, name).is_file()


def _read_json(path: Path) -> Any:
    """What a file of JSON holds; `None` if it is not there or cut."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _is_whole_safetensors(path: Path) -> bool:
    """By the format: the length of a header in 8 bytes, the header, which says where tensors end, and the tensors."""
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        size = path.stat().st_size
        if not 0 < length <= size - 8:
            return False
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, LookupError, TypeError, AttributeError):
            return False
    return 8 + length + max(ends, default=0) == size


def _is_whole_torch(path: Path) -> bool:
    """`torch.save` writes zip files, whose table of contents stands at their end; old versions wrote pickles."""
    with path.open("rb") as file:
        start = file.read(4)
    if not start.startswith(b"PK"):
        return start.startswith(b"\x80")
    try:
        with zipfile.ZipFile(path) as archive:
            return bool(archive.namelist())
    except zipfile.BadZipFile:
        return False
