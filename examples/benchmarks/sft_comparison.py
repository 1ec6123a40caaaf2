"""What `benchmark.py sft` does: optimizer steps of CLLMTrainer next to those of SFTTrainer over as many tokens."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from cllm_hf.cards import format_table
from cllm_hf.evaluation.benchmark import synchronize
from cllm_hf.evaluation.reporting import describe_environment, format_environment
from cllm_hf.training.config import CLLMConfig
from cllm_hf.training.trainer import CLLMTrainer

from .training_methods import LEARNING_RATE, Record, TrainingSetting


SFT, STORED, ONLINE = "SFTTrainer", "CLLMTrainer, states of the dataset", "CLLMTrainer, online states"


class _StepClock(TrainerCallback):
    """Seconds of each optimizer step after the first, loading of its batch included."""

    def __init__(self, device: torch.device):
        self.seconds: list[float] = []
        self._device = device
        self._last: float | None = None

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        synchronize(self._device)
        now = time.perf_counter()
        if self._last is not None:
            self.seconds.append(now - self._last)
        self._last = now


def compare_with_sft(
    model: Any,
    processing_class: Any,
    records: Sequence[Record],
    block_size: int,
    setting: TrainingSetting,
    show_progress: bool = True,
) -> dict[str, Any]:
    """
    Measure optimizer steps of `cllm_hf.CLLMTrainer` and of `trl.SFTTrainer` over as many tokens, in turns.

    A record of `CLLMTrainer` feeds its prompt, its response and one state of each block; for `SFTTrainer` it becomes
    one sequence of that length. Both see the records in the same order, with the same model, optimizer and dtype. The
    model is trained meanwhile, at a learning rate so small that it hardly changes.

    Args:
        model (`transformers.PreTrainedModel`): the model; all of its weights are trained.
        processing_class (`transformers.PreTrainedTokenizerBase`): its tokenizer.
        records (`Sequence[dict]`): at least `batch_size * (steps + 1)` records with `prompt_ids` and `response_ids`;
            with `states` too there is a row of their own.
        block_size (`int`): tokens of a block.
        setting (`TrainingSetting`): what is trained.
        show_progress (`bool`): whether to draw a progress bar.

    Returns:
        `dict`: everything that was measured, ready for JSON; `format_sft` makes a text of it.

    Raises:
        ValueError: if there are too few records, or for what `CLLMTrainer` refuses.
    """
    count = setting.batch_size * (setting.steps + 1)
    if len(records) < count:
        raise ValueError(
            f"`batch_size` times one more than `steps` takes {count} records, got {len(records)}. Lower one of "
            "the two."
        )
    records = records[:count]
    lengths = [_num_fed(record, block_size) for record in records]
    methods: dict[str, Callable[[str], Any]] = {
        SFT: lambda folder: SFTTrainer(
            model,
            SFTConfig(**_options(model, setting, folder), max_length=None),
            train_dataset=Dataset.from_list([{"input_ids": ids} for ids in _sequences(records, block_size)]),
            processing_class=processing_class,
        )
    }
    if all("states" in record for record in records):
        methods[STORED] = lambda folder: _our_trainer(model, processing_class, records, setting, folder)
    methods[ONLINE] = lambda folder: _our_trainer(
        model, processing_class, records, setting, folder, trajectory_source="online", block_size=block_size
    )
    was_training = model.training
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    with tqdm(total=setting.rounds * len(methods), desc="Measuring", unit="turn", disable=not show_progress) as bar:
        for _ in range(setting.rounds):
            for name, make in methods.items():
                with tempfile.TemporaryDirectory() as folder:
                    seconds[name] += _train(make(folder), model.device)
                bar.update()
    model.train(was_training)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "kind": "sft",
        "environment": describe_environment(model),
        "settings": {**vars(setting), "block_size": block_size},
        "lengths": lengths,
        "rows": [
            {
                "name": name,
                "tokens_per_update": setting.batch_size * statistics.mean(lengths),
                "seconds_per_update": medians[name],
                "throughput_over_sft": medians[SFT] / medians[name],
                "seconds": times,
            }
            for name, times in seconds.items()
        ],
    }


def format_sft(report: dict[str, Any]) -> str:
    """
    Write the result of `compare_with_sft` as Markdown.

    Args:
        report (`dict`): the result, or what `json.loads` has made of it.

    Returns:
        `str`: table, setting and machine.
    """
    settings = report["settings"]
    rows = [
        [
            row["name"],
            f"{row['tokens_per_update']:.0f}",
            f"{row['seconds_per_update']:.3g}",
            f"{row['tokens_per_update'] / row['seconds_per_update']:.0f}",
            f"{row['throughput_over_sft']:.2f}",
        ]
        for row in report["rows"]
    ]
    header = ["method", "tokens per optimizer step", "seconds", "tokens/s", "over SFTTrainer"]
    checkpointing = "with" if settings["gradient_checkpointing"] else "without"
    note = (
        f"{settings['batch_size']} records an optimizer step, of {min(report['lengths'])} to {max(report['lengths'])} "
        f"tokens: prompt, response, and one state of each block of {settings['block_size']}; a sequence of that "
        f"length for {SFT}. {checkpointing.capitalize()} gradient checkpointing. Medians of {settings['rounds']} "
        f"rounds of {settings['steps']} optimizer steps; the first of each round is left out."
    )
    return "\n\n".join([format_table(header, rows), note, format_environment(report["environment"])])


def _num_fed(record: Record, block_size: int) -> int:
    num_blocks = -(-len(record["response_ids"]) // block_size)
    return len(record["prompt_ids"]) + len(record["response_ids"]) + num_blocks * block_size


def _sequences(records: Sequence[Record], block_size: int) -> list[list[int]]:
    # The response again and again in place of the states: what the tokens are makes no difference to the time.
    return [
        (record["prompt_ids"] + record["response_ids"] * (2 + block_size))[: _num_fed(record, block_size)]
        for record in records
    ]


def _options(model: Any, setting: TrainingSetting, folder: str) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "per_device_train_batch_size": setting.batch_size,
        "max_steps": setting.steps + 1,
        "learning_rate": LEARNING_RATE,
        "gradient_checkpointing": setting.gradient_checkpointing,
        "bf16": False,  # in the dtype of the weights
        "use_cpu": model.device.type == "cpu",
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": [],
        "seed": setting.seed,
    }


def _our_trainer(
    model: Any, processing_class: Any, records: Sequence[Record], setting: TrainingSetting, folder: str, **given: Any
) -> CLLMTrainer:
    args = CLLMConfig(**_options(model, setting, folder), logging_first_step=False, plot_run=False, **given)
    dataset = Dataset.from_list(list(records))
    return CLLMTrainer(model, args=args, train_dataset=dataset, processing_class=processing_class)


def _train(trainer: Any, device: torch.device) -> list[float]:
    clock = _StepClock(device)
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(clock)
    trainer.train()
    return clock.seconds
