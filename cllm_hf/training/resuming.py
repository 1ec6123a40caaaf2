"""Going on after a stop exactly as if there had been none."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState, TrainerState

from .._host import base_model_of
from ..blocks.drafter import Drafter, find_drafter
from ..trajectories.fingerprints import fingerprint_records
from .checkpoints import STATE_NAME, find_flaw, holds_model_only


logger = logging.getLogger(__name__)

# Together they are the size of a batch.
_BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps", "world_size")


def newest_checkpoint(output_dir: str | Path) -> str | None:
    """
    Find the checkpoint that was written last, of those that a run can go on from; others are named in a warning.

    Args:
        output_dir (`str` or `pathlib.Path`): folder of the run. An earlier run may have left checkpoints of higher
            numbers there.

    Returns:
        `str`: its folder, or `None` if there is none.
    """
    for path in _checkpoints(output_dir):
        flaw = find_flaw(path)
        if flaw is None:
            return str(path)
        logger.warning("%s is not whole: it %s. An older one is taken if there is one.", path, flaw)
    return None


def _checkpoints(output_dir: str | Path) -> list[Path]:
    """All of them, the one that was written last first."""
    paths = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    folders = [path for path in paths if path.is_dir()]
    return sorted(folders, key=lambda path: (_time_of(path), int(path.name.removeprefix("checkpoint-"))), reverse=True)


def _time_of(checkpoint: Path) -> int:
    """When a checkpoint was finished, or begun if it was not finished; in nanoseconds."""
    state = checkpoint / STATE_NAME
    return (state if state.is_file() else checkpoint).stat().st_mtime_ns


def choose_checkpoint(
    wanted: str | Path | bool | None, args: Any, record: Mapping[str, Any] | None = None
) -> str | None:
    """
    Find the checkpoint that a run goes on from, and check that it can do so exactly.

    Args:
        wanted (`str`, `pathlib.Path` or `bool`, *optional*): a checkpoint, or `True` for the newest whole one of
            `output_dir`.
        args (`CLLMConfig`): options of the run.
        record (`Mapping[str, Any]`, *optional*): what [`describe_run`] says of the run.

    Returns:
        `str`: its folder, or `None` for a run from scratch.

    Raises:
        ValueError: if there is no whole checkpoint, none from which the run can go on exactly, or it is of a run with
            another dataset, seed or size of batches.
    """
    if wanted is True:
        wanted = newest_checkpoint(args.output_dir)
        if wanted is None:
            only_models = [path for path in _checkpoints(args.output_dir) if holds_model_only(path)]
            if only_models:
                raise ValueError(_explain_model_only(str(only_models[0])))
            raise ValueError(
                f"To go on, `output_dir` must hold a whole checkpoint, got none in {str(args.output_dir)!r}. "
                "Train without `resume_from_checkpoint`."
            )
    if not wanted:
        return None
    check_resumable(str(wanted), args)
    if record is not None and not check_same_run(str(wanted), record):
        logger.warning(
            "%s does not say which dataset, seed and size of batches it was trained with, as version 0.1.0 did not. "
            "Make sure that they are the same.",
            wanted,
        )
    return str(wanted)


def check_resumable(checkpoint: str, args: Any) -> None:
    """
    Check that a run can go on from a checkpoint exactly.

    Args:
        checkpoint (`str`): its folder.
        args (`CLLMConfig`): options of the run.

    Raises:
        ValueError: if the checkpoint is not whole, has no optimizer, or the order of the records is not known.
    """
    flaw = find_flaw(checkpoint)
    if flaw is not None and Path(checkpoint).is_dir() and holds_model_only(checkpoint) and "save_only" in flaw:
        raise ValueError(_explain_model_only(checkpoint))
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


def _explain_model_only(checkpoint: str) -> str:
    return (
        f"To go on, a checkpoint must hold the state of the optimizer, got {checkpoint!r}, written with "
        "`save_only_model=True`. Load its model, and train it as a new run."
    )


def describe_run(args: Any, dataset: Any = None) -> dict[str, Any]:
    """
    What decides which records an optimizer step trains on, for a checkpoint to tell it.

    Args:
        args (`CLLMConfig`): options of the run.
        dataset (`datasets.Dataset` or `datasets.IterableDataset`, *optional*): trajectories. Of a stream nothing is
            known.

    Returns:
        `dict[str, Any]`: ready for JSON.
    """
    return {
        "dataset": fingerprint_records(dataset) if isinstance(dataset, Dataset) else None,
        "num_records": len(dataset) if isinstance(dataset, Dataset) else None,
        "seed": args.seed,
        "data_seed": args.seed if args.data_seed is None else args.data_seed,
        **{name: getattr(args, name) for name in _BATCH},
    }


def record_run(trainer: Any) -> dict[str, Any]:
    """
    Describe the run of a trainer, and have its checkpoints tell of it.

    Args:
        trainer (`CLLMTrainer`): with a [`RunRecordCallback`].

    Returns:
        `dict[str, Any]`: as [`describe_run`] says.
    """
    record = describe_run(trainer.args, trainer.train_dataset)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, RunRecordCallback):
            callback.record = record
    return record


def check_same_run(checkpoint: str, record: Mapping[str, Any]) -> bool:
    """
    Check that a checkpoint is of a run on the same records in the same order, in batches of the same size.

    Args:
        checkpoint (`str`): its folder.
        record (`Mapping[str, Any]`): what [`describe_run`] says of this run; what it does not have is not compared.

    Returns:
        `bool`: whether the checkpoint says what it is of. Those of version 0.1.0 and of other trainers do not.

    Raises:
        ValueError: if it is of another one.
    """
    earlier = _recorded(checkpoint)
    difference = _describe_difference(earlier, record)
    if difference:
        raise ValueError(
            f"{checkpoint!r} is of another run: {difference}. Pass what that one was begun with, which continues it, "
            "or train without `resume_from_checkpoint`, into another `output_dir`."
        )
    return bool(earlier)


def _recorded(checkpoint: str) -> dict[str, Any]:
    state = json.loads((Path(checkpoint) / STATE_NAME).read_text(encoding="utf-8"))
    callbacks = state.get("stateful_callbacks")
    entry = callbacks.get(RunRecordCallback.__name__) if isinstance(callbacks, dict) else None
    entry = entry[-1] if isinstance(entry, list) and entry else entry  # of a trainer that had two of them
    arguments = entry.get("args") if isinstance(entry, dict) else None
    record = arguments.get("record") if isinstance(arguments, dict) else None
    return record if isinstance(record, dict) else {}


def _describe_difference(earlier: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    def differ(name: str) -> bool:
        return None not in (earlier.get(name), record.get(name)) and earlier[name] != record[name]

    names = [name for name in ("num_records", "seed", "data_seed") if differ(name)]
    if names == ["seed", "data_seed"] and earlier["seed"] == earlier["data_seed"]:
        names = ["seed"]
    sizes = [_product(one) for one in (earlier, record)]
    if None not in sizes and sizes[0] != sizes[1]:
        names += [name for name in _BATCH if differ(name)]
    parts = [f"`{name}` is {earlier[name]!r} there and {record[name]!r} here" for name in names]
    return "; ".join([*["other records in the dataset"] * differ("dataset"), *parts])


def _product(record: Mapping[str, Any]) -> int | None:
    """Records of an optimizer step; as many processes as there are may share them."""
    size = 1
    for name in _BATCH:
        if not isinstance(record.get(name), int):
            return None
        size *= record[name]
    return size


@contextmanager
def drafter_follows(trainer: Any, checkpoint: str | None) -> Iterator[None]:
    """
    Have the drafter of a lossless adapter be that of the checkpoints which a training begins and ends with:
    transformers loads the adapter of a checkpoint, and knows no drafter.

    Args:
        trainer (`CLLMTrainer`): trains in the block.
        checkpoint (`str`, *optional*): folder to go on from.
    """
    drafter: Any = find_drafter(base_model_of(trainer.model))
    if checkpoint is not None:
        drafter.load_state_dict(Drafter.load(checkpoint).state_dict())
    yield
    best = trainer.state.best_model_checkpoint
    if trainer.args.load_best_model_at_end and best:
        drafter.load_state_dict(Drafter.load(best).state_dict())


class RunRecordCallback(TrainerCallback, ExportableState):
    """
    Has every checkpoint say which run it is of, in its `trainer_state.json`.

    Args:
        record (`dict[str, Any]`, *optional*): what [`describe_run`] gave.
    """

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
