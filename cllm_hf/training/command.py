"""`cllm train`: from its options to a trained model and what is said of it."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import re
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import parse_flag_from_env
from datasets import Dataset
from transformers.integrations import get_available_reporting_integrations
from transformers.utils import is_bitsandbytes_available
from trl import ModelConfig, get_peft_config, get_quantization_config

from .._host import base_model_of
from ..files import check_writable
from ..loading import load_tokenizer
from ..names import Name
from ..parsing import OptionParser
from ..process import Process, quiet_hosts, show_notices
from ..trajectories.hub import check_can_push
from ..trajectories.loading import find_manifest, load_records
from ..trajectories.manifest import find_commit, fingerprint_weights, recorded_model
from ..trajectories.prompts import has_texts
from .callbacks import show_progress
from .checkpoints import choose_checkpoint, describe_run, newest_checkpoint
from .config import CLLMConfig, option
from .drafting import DraftingObjective
from .monitoring import LOSSLESS_METRICS, METRICS
from .objective import ConsistencyObjective
from .trainer import CLLMTrainer


NEWEST = "last"
# Options of `trl.ModelConfig` that transformers drops without a word if another is not there.
_NEEDED = {
    **{
        field.name: "use_peft"
        for field in dataclasses.fields(ModelConfig)
        if re.match("lora_|use_(rslora|dora)", field.name)
    },
    **{field.name: "load_in_4bit" for field in dataclasses.fields(ModelConfig) if "bnb_" in field.name},
}
_LOSSES = ("consistency_loss", "ar_loss", "drafting_loss", "draft_accuracy")
_NOT_SHOWN = ("runtime", "_per_second", "consistency_tokens", "ar_tokens", "drafting_tokens")
_STARTED = time.time()  # this is imported when the command runs

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class TrainArguments:
    """The options of `cllm train` that say what to train on; each has its meaning in the `help` of its metadata."""

    trajectories: str = dataclasses.field(
        metadata={
            "help": "folder or Hub id of the dataset, as `cllm collect` makes it; with --lossless or "
            "--trajectory-source online also a JSONL file or dataset of texts, `prompt` and `response` or `completion`"
        }
    )
    trajectories_config: str | None = option(None, "which configuration, if the dataset has several")
    trajectories_revision: str | None = option(None, "branch, tag or commit of the dataset on the Hub")
    train_split: str = option("train", "what to train on; a part of it as 'train[:1000]'")
    eval_split: str | None = option(
        None, "what to evaluate on, if `eval_strategy` or `do_eval` asks for that; by default test"
    )


class TrainOptions(NamedTuple):
    """All options of `cllm train`."""

    data: TrainArguments
    model: ModelConfig  # without a name the model that made the trajectories
    training: CLLMConfig


def parse_train(arguments: Sequence[str]) -> TrainOptions:
    """Read the options from the command line and a YAML file, by TRL's parser."""
    parser = OptionParser(
        [TrainArguments, ModelConfig, CLLMConfig],
        "cllm train",
        "Train a model on a dataset of trajectories: make it a CLLM. The options of `trl sft` for models, LoRA and "
        "training, and those of the consistency loss.",
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
    if not options.output_dir:
        parser.error("the following arguments are required: --output_dir/--output-dir")
    text = str(options.resume_from_checkpoint).lower()
    if text in ("true", "false", "none", NEWEST):
        options.resume_from_checkpoint = NEWEST if text in ("true", NEWEST) else None
    if not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU"):
        options.use_cpu = True


def run_train(options: TrainOptions) -> str:
    """Run the command; all that can be wrong is found before the model is loaded. Gives what there is to say of it."""
    data, training = options.data, options.training
    process, show_bars = Process.current(), sys.stderr.isatty()
    with show_notices(process.is_first), quiet_hosts(keep_bars=show_bars and process.is_first):
        checkpoint = _find_checkpoint(training)
        _check_options(options)
        if training.push_to_hub:
            name = training.hub_model_id or Path(str(training.output_dir)).absolute().name
            check_can_push(name, training.hub_token, kind="model")
        train_dataset, eval_dataset = _load_datasets(data, training)
        # The tokens of texts are not known yet; the trainer compares them.
        if checkpoint is not None and not has_texts(train_dataset.column_names):
            choose_checkpoint(checkpoint, training, describe_run(training, train_dataset))
        manifest = find_manifest(data.trajectories, data.trajectories_config, data.trajectories_revision)
        made_by = manifest.get("model", {})
        model = options.model
        if model.model_name_or_path is None:  # the trajectories are its own responses
            model.model_name_or_path, revision = recorded_model(data.trajectories, made_by)
            model.model_revision = revision or model.model_revision
        check_writable(Path(str(training.output_dir)))
        _check_place(str(model.model_name_or_path), training)
        try:
            trainer = _make_trainer(model, training, train_dataset, eval_dataset)
            _compare_models(model, made_by, trainer)
            show_progress(trainer, *_LOSSES, bar=show_bars and not training.disable_tqdm, show=process.is_first)
            with quiet_hosts():  # a bar for every file of every checkpoint is too much
                trainer.train(resume_from_checkpoint=checkpoint)
                if eval_dataset is not None and not _is_evaluated(trainer.state):
                    trainer.evaluate()
                published = _save(trainer, data.trajectories)
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"The memory of the device is full ({str(error).splitlines()[0]}). Lower "
                "`--per-device-train-batch-size` and raise `--gradient-accumulation-steps` as much, or lower "
                "`--max-length`."
            ) from error
        _end(trainer)
    return format_training(trainer.state, training, published) if process.is_first else ""


def format_training(state: Any, training: CLLMConfig, published: str | None = None) -> str:
    """Say what was trained, and what can be done with it."""
    parts = [f"Trained for {state.global_step} optimizer step{'s' * (state.global_step != 1)}."]
    losses = [log for log in state.log_history if any(name in log for name in _LOSSES)]
    for name in _LOSSES:
        values = [log[name] for log in losses if name in log]
        if values:
            change = f"{values[0]:.4g} -> {values[-1]:.4g}" if len(values) > 1 else f"{values[0]:.4g}"
            parts.append(f"{name}: {change}")
    evaluations = [log for log in state.log_history if "eval_loss" in log]
    for name, value in (evaluations or [{}])[-1].items():
        if name.startswith("eval_") and not name.endswith(_NOT_SHOWN):
            first = evaluations[0].get(name)
            before = f"{first:.4g} -> " if len(evaluations) > 1 and first is not None else ""
            parts.append(f"{name}: {before}{value:.4g}")
    folder = shlex.quote(str(training.output_dir))
    text = "\n".join(parts)
    text += (
        f"\n\nWritten: {training.output_dir}\n"
        f"Measure it with `cllm benchmark decode --model {folder} --prompts FILE`, with `--chat` if the responses are "
        "to chats."
    )
    return text if published is None else f"{text}\n\nPublished: {published}"


def describe_interruption(training: CLLMConfig) -> str:
    """Say how a training that was interrupted goes on."""
    checkpoint = newest_checkpoint(str(training.output_dir))
    if checkpoint is not None and training.resume_from_checkpoint is None:
        # One that an earlier run has left is no way to go on with this one.
        checkpoint = checkpoint if (Path(checkpoint) / "trainer_state.json").stat().st_mtime >= _STARTED else None
    if checkpoint is None or training.save_only_model:
        return "interrupted before there was a checkpoint (see `--save-steps`); the same command begins anew."
    return f"interrupted; the same command with `--resume-from-checkpoint {NEWEST}` goes on at {checkpoint}."


def _find_checkpoint(training: CLLMConfig) -> str | None:
    """Where to go on."""
    chosen = training.resume_from_checkpoint
    if chosen is not None:
        return choose_checkpoint(chosen == NEWEST or chosen, training)
    newest = newest_checkpoint(str(training.output_dir))
    if newest is not None:
        logger.warning(
            "%s is of an earlier run, and this one begins anew. `--resume-from-checkpoint %s` goes on there.",
            newest,
            NEWEST,
        )
    return None


def _check_options(options: TrainOptions) -> None:
    model, training = options.model, options.training
    if model.model_name_or_path is not None:
        Name.find(model.model_name_or_path).check("--model", "model")
    for name, needed in _NEEDED.items():
        if not getattr(model, needed) and getattr(model, name) != ModelConfig.__dataclass_fields__[name].default:
            raise ValueError(f"`{name}` has no effect without `{needed}`, got it alone. Pass `--{needed}` too.")
    if model.use_peft and model.lora_task_type != "CAUSAL_LM":
        raise ValueError(f"`lora_task_type` must be CAUSAL_LM here, got {model.lora_task_type!r}. Drop it.")
    if training.do_predict:
        raise ValueError("`cllm train` makes no predictions, got `do_predict`. `do_eval` evaluates.")
    _check_bits(model, training)
    _check_best_metric(training)
    available = get_available_reporting_integrations()
    absent = [name for name in training.report_to or () if name not in available]
    if absent:
        raise ValueError(
            f"`report_to` must name packages that are installed, got {', '.join(absent)}. Install it, or choose from "
            f"{', '.join(['none', *available])}."
        )


def _check_best_metric(training: CLLMConfig) -> None:
    """Check the name of a metric before the first evaluation looks for it."""
    name = training.metric_for_best_model
    if name is None:
        return
    objective: Any = DraftingObjective if training.lossless else ConsistencyObjective
    measured = LOSSLESS_METRICS if training.lossless else METRICS
    known = ["loss", *objective.loss_names, *(measured if training.num_monitored_prompts else ())]
    if name.removeprefix("eval_") not in known:
        raise ValueError(
            f"`metric_for_best_model` must be a metric that an evaluation logs, got {name!r}. Choose from "
            f"{', '.join(known)}."
        )


def _check_bits(model: ModelConfig, training: CLLMConfig) -> None:
    bits = 4 if model.load_in_4bit else 8 if model.load_in_8bit else None
    if bits is None:
        return
    missing = ["no GPU"] * (not torch.accelerator.is_available() or training.use_cpu)
    missing += ["no package `bitsandbytes`"] * (not is_bitsandbytes_available())
    if missing:
        raise ValueError(
            f"`load_in_{bits}bit` takes a GPU and the package `bitsandbytes`, got {' and '.join(missing)}. Drop it; "
            "`--dtype bfloat16` needs half the memory of float32."
        )
    if not model.use_peft and not training.lossless:
        raise ValueError(
            f"Weights in {bits} bits are not trained, an adapter on them is, got `load_in_{bits}bit` without "
            "`use_peft` or `lossless`. Pass one of them too."
        )


def _check_place(model_name: str, training: CLLMConfig) -> None:
    found = Name.find(model_name)
    if found.is_folder and found.full == Name.find(Path(str(training.output_dir))).full:
        raise ValueError(
            f"The trained model would take the place of the one that it is made from, got `output_dir` {model_name!r} "
            "for both. Choose another output folder."
        )


def _load_datasets(data: TrainArguments, training: CLLMConfig) -> tuple[Dataset, Dataset | None]:
    def load(split: str) -> Any:
        return load_records(data.trajectories, split, data.trajectories_config, data.trajectories_revision)

    train_dataset = load(data.train_split)
    if not training.do_eval and not training.eval_on_start:
        return train_dataset, None
    try:
        return train_dataset, load(data.eval_split or "test")
    except ValueError as error:
        if data.eval_split is not None:
            raise
        raise ValueError(
            f"Evaluation takes a split `test`, which {data.trajectories} does not have ({str(error).rstrip('.')}). "
            "Name one as `--eval-split`, or parts (`--train-split 'train[20%:]' --eval-split 'train[:20%]'`), "
            "collect with `--test-fraction`, or drop `--eval-strategy`."
        ) from error


def _make_trainer(
    model: ModelConfig, training: CLLMConfig, train_dataset: Dataset, eval_dataset: Dataset | None
) -> CLLMTrainer:
    name = str(model.model_name_or_path)
    revision = None if model.model_revision == "main" else model.model_revision
    given: Any = training.model_init_kwargs or {}
    options = {"dtype": model.dtype, "attn_implementation": model.attn_implementation, "revision": revision, **given}
    training.model_init_kwargs = {option: value for option, value in options.items() if value is not None}
    try:
        return CLLMTrainer(
            name,
            args=training,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=load_tokenizer(name, revision, training.trust_remote_code),
            quantization_config=get_quantization_config(model),
            peft_config=get_peft_config(model),
        )
    except ImportError as error:  # what this model or kind of attention needs
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"Training {name} needs a package that is not installed: {reason} Install it.") from error


def _compare_models(model: ModelConfig, made_by: Mapping[str, Any], trainer: CLLMTrainer) -> None:
    """Warn if the trajectories are not the model's own, so that it learns another model's answers."""
    name, target = str(model.model_name_or_path), made_by.get("name")
    if not target or (Name.find(name).full == Name.find(target).full and _has_commit(model, made_by)):
        return
    if made_by.get("fingerprint") == fingerprint_weights(base_model_of(trainer.model)):
        return
    commit = f" at {made_by['revision']}" if made_by.get("revision") else ""
    logger.warning(
        "The trajectories were made by %s%s, and %s is trained. That is right if it is the same model in another "
        "place; otherwise collect the model's own answers, which it can learn without losing quality.",
        target,
        commit,
        name,
    )


def _has_commit(model: ModelConfig, made_by: Mapping[str, Any]) -> bool:
    """Whether a model of the Hub is the one of that commit, as far as is known."""
    revision = None if model.model_revision == "main" else model.model_revision
    commit = find_commit(str(model.model_name_or_path), revision)
    return None in (commit, made_by.get("revision")) or commit == made_by["revision"]


def _is_evaluated(state: Any) -> bool:
    """Whether the last optimizer step was evaluated."""
    return any("eval_loss" in log and log.get("step") == state.global_step for log in state.log_history)


def _save(trainer: CLLMTrainer, trajectories: str) -> str | None:
    """Save the model, and publish it if that was asked for; gives its id on the Hub."""
    if not trainer.args.push_to_hub:
        trainer.save_model()
        return None
    try:
        trainer.push_to_hub(dataset_name=Name.find(trajectories).hub_id)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OSError(
            f"The model is complete in {trainer.args.output_dir}, but was not published: {reason}"
        ) from error
    return trainer.hub_model_id


def _end(trainer: CLLMTrainer) -> None:
    """Leave the other processes."""
    # The wrapper of the model goes first: if it were the last to hold the process group, it would wait for gloo's
    # threads, which may wait for the lock of the interpreter, which it does not release.
    trainer.model_wrapped = trainer.model
    trainer.accelerator.free_memory()
    trainer.end()
