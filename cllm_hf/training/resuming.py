"""Going on after a stop exactly as if there had been none."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import TrainerState


logger = logging.getLogger(__name__)

_STATE_NAME = "trainer_state.json"  # the last file that a checkpoint gets


def newest_checkpoint(output_dir: str | Path) -> str | None:
    """
    Find the checkpoint that was written last, of those that are whole.

    Args:
        output_dir (`str` or `pathlib.Path`): folder of the run. An earlier run may have left checkpoints of higher
            numbers there.

    Returns:
        `str`: its folder, or `None` if there is none.
    """
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    folders.sort(key=lambda path: (_time_of(path), int(path.name.removeprefix("checkpoint-"))), reverse=True)
    for path in folders:
        if is_whole(path):
            return str(path)
        logger.warning("%s is not whole: the run was stopped while it was written. An older one is taken.", path)
    return None


def _time_of(checkpoint: Path) -> int:
    """When a checkpoint was finished, or begun if it was not finished; in nanoseconds."""
    state = checkpoint / _STATE_NAME
    return (state if state.is_file() else checkpoint).stat().st_mtime_ns


def is_whole(checkpoint: str | Path) -> bool:
    """
    Whether a checkpoint was written to its end.

    Args:
        checkpoint (`str` or `pathlib.Path`): its folder.

    Returns:
        `bool`.
    """
    try:
        json.loads((Path(checkpoint) / _STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def choose_checkpoint(wanted: str | Path | bool | None, args: Any) -> str | None:
    """
    Find the checkpoint that a run goes on from, and check that it can do so exactly.

    Args:
        wanted (`str`, `pathlib.Path` or `bool`, *optional*): a checkpoint, or `True` for the newest whole one of
            `output_dir`.
        args (`CLLMConfig`): options of the run.

    Returns:
        `str`: its folder, or `None` for a run from scratch.

    Raises:
        ValueError: if there is no whole checkpoint, or none from which the run can go on exactly.
    """
    if wanted is True:
        wanted = newest_checkpoint(args.output_dir)
        if wanted is None:
            raise ValueError(
                f"To go on, `output_dir` must hold a whole checkpoint, got none in {str(args.output_dir)!r}. "
                "Train without `resume_from_checkpoint`."
            )
    if not wanted:
        return None
    check_resumable(str(wanted), args)
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
    if not is_whole(checkpoint):
        raise ValueError(
            f"`resume_from_checkpoint` must be a whole checkpoint, got {checkpoint!r}, which has no {_STATE_NAME}. "
            "Pass `True` for the newest whole one of `output_dir`."
        )
    # DeepSpeed keeps its schedule in files of its own.
    if not args.deepspeed and not (Path(checkpoint) / "scheduler.pt").is_file():
        raise ValueError(
            f"To go on, a checkpoint must hold the state of the optimizer, got {checkpoint!r}, written with "
            "`save_only_model=True`. Load its model, and train it as a new run."
        )
    seedable = args.accelerator_config.use_seedable_sampler
    if args.train_sampling_strategy not in ("random", "sequential") or not seedable:
        raise ValueError(
            "To go on, the order of the records must follow from the seed, got "
            f"`train_sampling_strategy={args.train_sampling_strategy!r}` and `use_seedable_sampler={seedable}`. Train "
            'from the start, with `train_sampling_strategy="random"`.'
        )


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
