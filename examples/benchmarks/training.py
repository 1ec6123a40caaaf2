"""What `benchmark.py train` does: draft tokens trained per second and peak memory, next to the published step."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback

from cllm_hf._host import set_checkpointing
from cllm_hf.cards import format_table
from cllm_hf.evaluation.benchmark import PeakMemory, synchronize
from cllm_hf.evaluation.reporting import describe_environment, format_environment
from cllm_hf.trajectories.schema import check_dataset

from .loss_check import compare_losses, draw_examples
from .training_methods import (
    PUBLISHED,
    PUBLISHED_ACCUMULATED,
    PUBLISHED_WITH_GRAPH,
    TRAINER,
    Record,
    TrainingMethod,
    TrainingSetting,
    make_methods,
    make_trainer,
    usable_records,
)


@dataclass
class TrainingResult:
    """
    What a method did.

    Attributes:
        method (`TrainingMethod`): the method.
        num_tokens (`list[int]`): draft tokens that each round trained on.
        num_loss_positions (`list[int]`): those among them with a consistency loss.
        seconds (`list[float]`): time of each round.
        peak_memory (`int`, *optional*): most bytes that the largest update took beside what was there before it.
    """

    method: TrainingMethod
    num_tokens: list[int] = field(default_factory=list)
    num_loss_positions: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    peak_memory: int | None = None

    @property
    def tokens_per_second(self) -> float:
        """`float`: trained draft tokens per second; the median over the rounds."""
        return statistics.median(self._rates())

    def speedup_over(self, baseline: TrainingResult) -> float:
        """
        Trained draft tokens per second over those of another method: the median over the rounds of the ratio.

        Args:
            baseline (`TrainingResult`): a result of the same call of `measure_training`.

        Returns:
            `float`.
        """
        return statistics.median(ours / theirs for ours, theirs in zip(self._rates(), baseline._rates()))

    def _rates(self) -> list[float]:
        return [tokens / seconds for tokens, seconds in zip(self.num_tokens, self.seconds)]


def compare_training(
    model: Any,
    processing_class: Any,
    dataset: Dataset,
    setting: TrainingSetting | None = None,
    show_progress: bool = True,
) -> dict[str, Any]:
    """
    Measure the step of `cllm_hf.CLLMTrainer` and the published one on the same records, in turns.

    First both must give the same losses for the same state of the same block, in float32. The model is trained
    meanwhile, at a learning rate so small that it hardly changes; it is left in the mode that it came in.

    Args:
        model (`transformers.PreTrainedModel`): the model, without adapter.
        processing_class (`transformers.PreTrainedTokenizerBase`): its tokenizer.
        dataset (`datasets.Dataset`): trajectories, of which the first `batch_size * steps` are trained on.
        setting (`TrainingSetting`, *optional*): what is trained.
        show_progress (`bool`): whether to draw a progress bar.

    Returns:
        `dict`: everything that was measured, ready for JSON; `format_training` makes a text of it.

    Raises:
        ValueError: if the model has an adapter, there are too few records, they do not fit the model, a number is
            below 1, the losses differ, or for what `CLLMTrainer` refuses.
    """
    setting = TrainingSetting() if setting is None else setting
    _check(model, setting)
    block_size = check_dataset(dataset)
    records = usable_records(dataset, setting.batch_size * setting.steps)
    _check_records(model, records)
    was_training, device = model.training, model.device
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(model, processing_class, dataset, setting, folder)
        for callback in (PrinterCallback, ProgressCallback):  # they would print what `log` is told
            trainer.remove_callback(callback)
        if trainer.args.device != device:
            raise ValueError(
                f"`CLLMTrainer` trains on {trainer.args.device}, got a model on {device}. Put the model there."
            )
        try:
            differences = compare_losses(trainer, draw_examples(records, setting.seed))
            model.train()
            if setting.gradient_checkpointing:
                set_checkpointing(model, True)
            methods = make_methods(trainer, records, setting)
            num_turns = (setting.rounds + 1) * len(methods)
            with tqdm(total=num_turns, desc="Measuring", unit="turn", disable=not show_progress) as bar:
                results = measure_training(methods, setting, device, bar.update)
        finally:
            if setting.gradient_checkpointing:
                set_checkpointing(model, False)
            model.train(was_training)
    lengths = [[len(record[name]) for record in records] for name in ("prompt_ids", "response_ids")]
    return {
        "kind": "train",
        "environment": describe_environment(model),
        "settings": {
            "block_size": block_size,
            "batch_size": setting.batch_size,
            "steps": setting.steps,
            "rounds": setting.rounds,
            "states_per_block": setting.states_per_block,
            "gradient_checkpointing": setting.gradient_checkpointing,
            "ar_loss_weight": trainer.args.ar_loss_weight,
            "optimizer": type(trainer.optimizer).__name__,
            "seed": setting.seed,
            "num_records": len(records),
        },
        "prompt_lengths": lengths[0],
        "response_lengths": lengths[1],
        "loss_differences": differences,
        "rows": [_row(result, results) for result in results],
    }


def measure_training(
    methods: Sequence[TrainingMethod],
    setting: TrainingSetting,
    device: torch.device,
    on_turn: Callable[[], object] = lambda: None,
) -> list[TrainingResult]:
    """
    Train in several ways, in turns, so that a change of the machine's speed meets all of them.

    Before the clocks start, each method makes one optimizer step, which also makes the state of the optimizer. A clock
    is around whole updates: from records to tensors, forward passes, backwards, optimizer. Memory is measured in
    optimizer steps of its own, off the clock, on the longest records.

    Args:
        methods (`Sequence[TrainingMethod]`): what to compare.
        setting (`TrainingSetting`): what is trained.
        device (`torch.device`): of the model.
        on_turn (`Callable`): called after each turn.

    Returns:
        `list[TrainingResult]`: one for each method, in their order.
    """
    results = [TrainingResult(method) for method in methods]
    for turn in range(setting.rounds + 1):
        for result in results:
            method = result.method
            torch.manual_seed(setting.seed + turn)
            synchronize(device)
            start = time.perf_counter()
            counts = [method.update(records) for records in (method.updates if turn > 0 else method.updates[:1])]
            synchronize(device)
            seconds = time.perf_counter() - start
            num_positions = sum(positions for _, positions in counts)
            if method.count_loss_positions is not None:
                num_positions = method.count_loss_positions()
            if turn > 0:
                result.seconds.append(seconds)
                result.num_tokens.append(sum(tokens for tokens, _ in counts))
                result.num_loss_positions.append(num_positions)
                _measure_memory(result, device)
            on_turn()
    return results


def _measure_memory(result: TrainingResult, device: torch.device) -> None:
    with PeakMemory(device) as memory:
        result.method.update_largest()
        synchronize(device)
    if result.method.count_loss_positions is not None:
        result.method.count_loss_positions()  # those of this optimizer step are not of the next round
    if memory.num_bytes is not None:
        result.peak_memory = max(memory.num_bytes, result.peak_memory or 0)


def format_training(report: dict[str, Any]) -> str:
    """
    Write the result of `compare_training` as Markdown.

    Args:
        report (`dict`): the result, or what `json.loads` has made of it.

    Returns:
        `str`: table, setting, machine and notes.
    """
    settings = report["settings"]
    header = [
        "method",
        "records an optimizer step",
        "draft tokens per optimizer step",
        "with a loss",
        "draft tokens/s",
    ]
    header += ["speed-up", "over accumulated", "peak MiB"]
    rows = [
        [
            row["name"],
            str(row["num_records"]),
            f"{row['tokens_per_update']:.1f}",
            f"{row['loss_positions_per_update']:.1f}",
            f"{row['tokens_per_second']:.{0 if row['tokens_per_second'] >= 100 else 1}f}",
            f"{row['speedup']:.1f}x",
            f"{row['speedup_over_accumulated']:.1f}x",
            _mebibytes(row["peak_memory"]),
        ]
        for row in report["rows"]
    ]
    lengths = " and ".join(
        f"{what} of {_span(report[name])}"
        for what, name in (("Prompts", "prompt_lengths"), ("responses", "response_lengths"))
    )
    checkpointing = "with" if settings["gradient_checkpointing"] else "without"
    setting = (
        f"{lengths} tokens, blocks of {settings['block_size']}, {settings['states_per_block']} of the states of a "
        f"block an optimizer step of {TRAINER}; {settings['num_records']} records, {checkpointing} gradient "
        f"checkpointing, {settings['optimizer']}. Rounds: {settings['rounds']}. The published procedure, written anew "
        "from its description, has one state of one block of one record an optimizer step, three forward passes and "
        "two backward ones; accumulated, an optimizer step has a state of every block of a record, one after the "
        "other. Peak memory is beside weights and state of the optimizer, and that of an optimizer step with every "
        "block of the longest record, accumulated by the published procedure, or of as many of the longest as an "
        f"optimizer step of {TRAINER} has."
    )
    differences = report["loss_differences"]
    same = (
        "The same state of the same block gives both the same losses in float32: over the loss or 1 they differ by "
        f"at most {differences['consistency_loss']:.1e} (consistency) and {differences['ar_loss']:.1e} (AR)."
    )
    notes = [setting, *_format_memory(report["rows"]), same, format_environment(report["environment"])]
    return "\n\n".join([format_table(header, rows), *notes])


def _format_memory(rows: list[dict[str, Any]]) -> list[str]:
    by_name = {row["name"]: row["peak_memory"] for row in reversed(rows)}  # of the trainer's the one with one record
    if not all(row["peak_memory"] for row in rows):  # not measured, or too little to show in that of the process
        return []
    ours, published, with_graph = (by_name[name] for name in (TRAINER, PUBLISHED_ACCUMULATED, PUBLISHED_WITH_GRAPH))
    return [
        f"For the same draft tokens, one state of every block of the longest record, {TRAINER} takes "
        f"{ours / published:.2f} times the peak memory of the published procedure, accumulated, and "
        f"{ours / with_graph:.2f} times that with the graph of the targets that the published code keeps. Larger "
        "updates take no more in any of these ways if they are accumulated."
    ]


def _mebibytes(num_bytes: int | None) -> str:
    return "-" if num_bytes is None else f"{num_bytes / 2**20:.0f}"


def _span(lengths: list[int]) -> str:
    return f"{min(lengths)} to {max(lengths)}" if min(lengths) < max(lengths) else f"{lengths[0]}"


def _row(result: TrainingResult, results: Sequence[TrainingResult]) -> dict[str, Any]:
    baselines = {one.method.name: one for one in results}
    updates = result.method.updates
    num_updates = len(updates) * len(result.seconds)
    return {
        "name": result.method.name,
        "num_records": len(updates[0]),
        "num_updates": len(updates),
        "tokens_per_update": sum(result.num_tokens) / num_updates,
        "loss_positions_per_update": sum(result.num_loss_positions) / num_updates,
        "tokens_per_second": result.tokens_per_second,
        "speedup": result.speedup_over(baselines[PUBLISHED]),
        "speedup_over_accumulated": result.speedup_over(baselines[PUBLISHED_ACCUMULATED]),
        "peak_memory": result.peak_memory,
        "num_tokens": result.num_tokens,
        "num_loss_positions": result.num_loss_positions,
        "seconds": result.seconds,
    }


def _check(model: Any, setting: TrainingSetting) -> None:
    for name in ("batch_size", "steps", "rounds", "states_per_block"):
        if getattr(setting, name) < 1:
            raise ValueError(f"`{name}` must be at least 1, got {getattr(setting, name)}.")
    if getattr(model, "peft_config", None):
        raise ValueError(
            "Whole models are compared, got one with an adapter. Pass its base model, or what `merge_and_unload` "
            "gives."
        )


def _check_records(model: Any, records: Sequence[Record]) -> None:
    config = model.config.get_text_config()
    largest = max(max(*record["prompt_ids"], *record["response_ids"]) for record in records)
    longest = max(len(record["prompt_ids"]) + len(record["response_ids"]) for record in records)
    if largest >= config.vocab_size:
        raise ValueError(
            f"The trajectories must be of the model, whose vocabulary has {config.vocab_size} tokens, got token "
            f"{largest}. Pass the model that they were collected from."
        )
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and longest > limit:
        raise ValueError(
            f"A prompt and response of {longest} tokens do not fit into the model's {limit} positions. Drop such "
            "records."
        )
