"""The options of `cllm train`. Nothing heavy is imported here."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple


if TYPE_CHECKING:
    from trl import ModelConfig

    from .config import CLLMConfig

TRAIN_HELP = "train a model on a dataset of trajectories: make it a CLLM"
NEWEST = "last"


def _option(default: Any, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass
class TrainArguments:
    """The options of `cllm train` that say what to train on; each has its meaning in the `help` of its metadata."""

    trajectories: str = dataclasses.field(
        metadata={"help": "folder or Hub id of the dataset, as `cllm collect` makes it"}
    )
    trajectories_config: str | None = _option(None, "which configuration, if the dataset has several")
    trajectories_revision: str | None = _option(None, "branch, tag or commit of the dataset on the Hub")
    train_split: str = _option("train", "what to train on; a part of it as 'train[:1000]'")
    eval_split: str | None = _option(
        None, "what to evaluate on, if `eval_strategy` or `do_eval` asks for that; by default test"
    )


class TrainOptions(NamedTuple):
    """
    All options of `cllm train`.

    Attributes:
        data (`TrainArguments`): what to train on.
        model (`trl.ModelConfig`): what to train; without a name the model that made the trajectories.
        training (`CLLMConfig`): how.
    """

    data: TrainArguments
    model: ModelConfig
    training: CLLMConfig


def parse_train(arguments: Sequence[str]) -> TrainOptions:
    """
    Read the options of `cllm train` from the command line and a YAML file, by TRL's parser.

    Args:
        arguments (`Sequence[str]`): what stands after `train`. Options win over the file of `--config`.

    Returns:
        `TrainOptions`.

    Raises:
        OSError: if the YAML file cannot be read.
        ValueError: for unknown options, values that a class refuses, or a file that is not YAML.
        SystemExit: after `--help`, and with status 2 for missing options and values that cannot be read.
    """
    from trl import ModelConfig

    from ..parsing import OptionParser
    from .config import CLLMConfig

    parser = OptionParser(
        [TrainArguments, ModelConfig, CLLMConfig],
        "cllm train",
        f"{TRAIN_HELP}. The options of `trl sft` for models, LoRA and training, and those of the consistency loss.",
        usage="cllm train --trajectories DATASET --output-dir FOLDER [--model MODEL] [--config FILE] [options]",
        other_names={"model": "model_name_or_path"},
        convert={"resume_from_checkpoint": _read_checkpoint},
        adapt=_fit_machine,
    )
    return TrainOptions(*parser.read(arguments))


def _read_checkpoint(value: Any) -> Any:
    """YAML has its own true and false."""
    return {True: NEWEST, False: None}[value] if isinstance(value, bool) else value


def _fit_machine(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Defaults of a command: the device that there is, and a place for the model."""
    import torch
    from accelerate.utils import parse_flag_from_env

    if options.output_dir is None:
        parser.error("the following arguments are required: --output_dir/--output-dir")
    text = str(options.resume_from_checkpoint).lower()
    if text in ("true", "false", "none", NEWEST):
        options.resume_from_checkpoint = NEWEST if text in ("true", NEWEST) else None
    if not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU"):
        options.use_cpu = True
