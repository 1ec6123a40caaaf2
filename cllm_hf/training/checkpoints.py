"""Going on after a stop exactly as if there had been none: which checkpoints are whole, and which are of this run."""

from __future__ import annotations

import json
import math
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import Dataset
from safetensors import SafetensorError, safe_open
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState, TrainerState
from transformers.utils import logging

from .._host import base_model_of
from ..blocks.drafter import Drafter, find_drafter
from ..files import path_inside
from ..trajectories.manifest import fingerprint_records


logger = logging.get_logger(__name__)

_STATE = "trainer_state.json"  # the last file that a checkpoint gets
_JSON = ("config.json", "generation_config.json", "adapter_config.json", "tokenizer.json", "tokenizer_config.json")
_TORCH = re.compile(
    r"(optimizer|scheduler|scaler|rng_state|training_args|pytorch_model|adapter_model).*\.(pt|pth|bin)"
)
_WEIGHTS = re.compile(r"(model|adapter_model|pytorch_model)\.(safetensors|bin)(\.index\.json)?|pytorch_model_fsdp.*")
_OF_DEEPSPEED = re.compile(r"global_step\d+|latest")
_NEEDED = {"optimizer": "optimizer.pt", "scheduler.pt": "scheduler.pt", "rng_state": "rng_state.pth"}
# Together they are the size of a batch.
_BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps", "world_size")


def find_flaw(checkpoint: str | Path) -> str | None:
    """
    Find why no run can go on from a checkpoint: a file that is missing, or cut as by a kill or a loss of power.

    Files are opened and measured, not read whole.

    Returns:
        `str`: what is wrong, as in "has no optimizer.pt"; `None` if the checkpoint is whole.
    """
    folder = Path(checkpoint)
    state = _read_json(folder / _STATE)
    if not isinstance(state, dict) or not isinstance(state.get("global_step"), int):
        return f"has no whole {_STATE}, which is written last"
    try:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and not _is_whole(path):
                return f"has a file that was cut, {path.relative_to(folder).as_posix()}"
    except (OSError, ValueError) as error:
        return f"cannot be read ({error})"
    names = {path.name for path in folder.iterdir()}
    if any(map(_OF_DEEPSPEED.fullmatch, names)):  # keeps all of this in files of its own
        return None
    # Each of several adapters has a folder.
    if not any(map(_WEIGHTS.fullmatch, names)) and not any(folder.glob("*/adapter_model.*")):
        return "has no weights"
    missing = [file for part, file in _NEEDED.items() if not any(part in name for name in names)]
    if len(missing) == len(_NEEDED):
        return "holds no state of the optimizer: `save_only_model=True` leaves a model to train as a new run"
    return f"has no {missing[0]}" if missing else None


def _is_whole(path: Path) -> bool:
    """Whether a file is as long as it says, and can be what it is called."""
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt"):
                return True
        except SafetensorError:
            return False
    if _TORCH.fullmatch(path.name):
        # `torch.save` writes zip files, whose table of contents stands at their end; old versions wrote pickles.
        with path.open("rb") as file:
            is_pickle = file.read(1) == b"\x80"
        return is_pickle or zipfile.is_zipfile(path)
    if path.name in _JSON:
        return _read_json(path) is not None
    if path.name.endswith(".index.json"):
        index = _read_json(path)
        shards = index.get("weight_map") if isinstance(index, dict) else None
        return isinstance(shards, dict) and all(path_inside(path.parent, name).is_file() for name in shards.values())
    return True


def _read_json(path: Path) -> Any:
    """What a file of JSON holds; `None` if it is not there or cut."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def newest_checkpoint(output_dir: str | Path) -> str | None:
    """
    Find the checkpoint that was written last, of those that a run can go on from; others are named in a warning.

    An earlier run may have left checkpoints of higher numbers there.
    """
    paths = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    folders = [path for path in paths if path.is_dir()]
    for path in sorted(folders, key=lambda path: (_time_of(path), int(path.name.split("-")[1])), reverse=True):
        flaw = find_flaw(path)
        if flaw is None:
            return str(path)
        logger.warning("%s is not whole: it %s. An older one is taken if there is one.", path, flaw)
    return None


def _time_of(checkpoint: Path) -> int:
    """When a checkpoint was finished, or begun if it was not finished; in nanoseconds."""
    state = checkpoint / _STATE
    return (state if state.is_file() else checkpoint).stat().st_mtime_ns


def choose_checkpoint(
    wanted: str | Path | bool | None, args: Any, record: Mapping[str, Any] | None = None
) -> str | None:
    """
    Find the checkpoint that a run goes on from, and check that it can do so exactly: the one that is wanted, with
    `True` the newest whole one of `output_dir`. `record` is what `describe_run` says of the run.
    """
    if not wanted:
        return None
    checkpoint = newest_checkpoint(args.output_dir) if wanted is True else str(wanted)
    if checkpoint is None:
        raise ValueError(
            f"To go on, `output_dir` must hold a whole checkpoint, got none in {str(args.output_dir)!r}. Train "
            "without `resume_from_checkpoint`."
        )
    flaw = None if wanted is True else find_flaw(checkpoint)
    if flaw is not None:
        raise ValueError(
            f"`resume_from_checkpoint` must be a whole checkpoint, got {checkpoint!r}, which {flaw}. Pass `True` for "
            "the newest whole one of `output_dir`."
        )
    seedable = args.accelerator_config.use_seedable_sampler
    if args.train_sampling_strategy not in ("random", "sequential") or not seedable:
        raise ValueError(
            "To go on, the order of the records must follow from the seed, got "
            f"`train_sampling_strategy={args.train_sampling_strategy!r}` and `use_seedable_sampler={seedable}`. Train "
            'from the start, with `train_sampling_strategy="random"`.'
        )
    if record is not None:
        _check_same_run(checkpoint, record)
    return checkpoint


def describe_run(args: Any, dataset: Any = None) -> dict[str, Any]:
    """
    What decides which records an optimizer step trains on, for a checkpoint to tell it. Of a stream nothing is known.
    """
    return {
        "dataset": fingerprint_records(dataset) if isinstance(dataset, Dataset) else None,
        "num_records": len(dataset) if isinstance(dataset, Dataset) else None,
        "seed": args.seed,
        "data_seed": args.seed if args.data_seed is None else args.data_seed,
        **{name: getattr(args, name) for name in _BATCH},
    }


def _check_same_run(checkpoint: str, record: Mapping[str, Any]) -> None:
    """Check that a checkpoint is of a run on the same records in the same order, in batches of the same size."""
    earlier = _recorded(checkpoint)
    if not earlier:
        logger.warning_once(
            "%s does not say which dataset, seed and size of batches it was trained with, as version 0.1.0 did not. "
            "Make sure that they are the same.",
            checkpoint,
        )

    def differ(name: str) -> bool:
        return None not in (earlier.get(name), record.get(name)) and earlier[name] != record[name]

    names = ["num_records", "seed", "data_seed"]
    # Of an optimizer step; as many processes as there are may share its records.
    sizes = [math.prod(one.get(name, 0) for name in _BATCH) for one in (earlier, record)]
    if sizes[0] != sizes[1]:
        names += _BATCH
    differences = ["other records in the dataset"] * differ("dataset")
    differences += [f"`{name}` is {earlier[name]!r} there and {record[name]!r} here" for name in names if differ(name)]
    if differences:
        raise ValueError(
            f"{checkpoint!r} is of another run: {'; '.join(differences)}. Pass what that one was begun with, which "
            "continues it, or train without `resume_from_checkpoint`, into another `output_dir`."
        )


def _recorded(checkpoint: str) -> dict[str, Any]:
    """What a checkpoint says it is of. Those of version 0.1.0 and of other trainers say nothing."""
    try:
        entry = _read_json(Path(checkpoint) / _STATE)["stateful_callbacks"][RunRecordCallback.__name__]
        return (entry[-1] if isinstance(entry, list) else entry)["args"]["record"] or {}
    except (LookupError, TypeError):
        return {}


@contextmanager
def drafter_follows(trainer: Any, checkpoint: str | None) -> Iterator[None]:
    """
    Have the drafter of a lossless adapter be that of the checkpoints which a training begins and ends with:
    transformers loads the adapter of a checkpoint, and knows no drafter.
    """
    drafter: Any = find_drafter(base_model_of(trainer.model))
    if checkpoint is not None:
        drafter.load_state_dict(Drafter.load(checkpoint).state_dict())
    yield
    best = trainer.state.best_model_checkpoint
    if trainer.args.load_best_model_at_end and best:
        drafter.load_state_dict(Drafter.load(best).state_dict())


class RunRecordCallback(TrainerCallback, ExportableState):
    """Has every checkpoint say which run it is of, in its `trainer_state.json`: what `describe_run` gave."""

    def __init__(self, record: dict[str, Any] | None = None) -> None:
        self.record = record

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Make room among what the checkpoint of another version says; transformers expects an entry there."""
        if isinstance(state.stateful_callbacks, dict):
            state.stateful_callbacks[type(self).__name__] = self.state()

    def state(self) -> dict[str, Any]:
        """What `trainer_state.json` gets."""
        return {"args": {"record": self.record}, "attributes": {}}


class EpochCallback(TrainerCallback):
    """
    Tells the sampler its epoch.

    transformers does so through the loader of the batches, but with several processes not through the one that skips
    those before a checkpoint: it would give the order of the first epoch in any other.
    """

    def on_epoch_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Before the batches of an epoch, or of the rest of one, are fetched."""
        loader: Any = kwargs.get("train_dataloader")
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(int(state.epoch or 0))
