"""What is shown while a model trains."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from tqdm.auto import tqdm
from transformers import ProgressCallback, Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback


# What the host logs beside what was learned.
_INCIDENTAL = ("runtime", "_per_second", "total_flos", "epoch", "num_tokens")


class UpdateBar(TrainerCallback):
    """
    A progress bar over optimizer steps that shows logged values, and a line for each evaluation.

    Args:
        values (`str`): their names.
    """

    def __init__(self, *values: str):
        self.values = values
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="Training", unit="step")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.set_description_str("Evaluating")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        shown = {name: f"{float(logs[name]):.3f}" for name in self.values if logs and name in logs}
        if shown:
            self.bar.set_postfix(shown)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        if self.bar is not None and not self.bar.disable:
            self.bar.write(format_log(state.global_step, state.max_steps, metrics or {}), file=sys.stderr)
            self.bar.set_description_str("Training")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()
        self.bar = None


class UpdateLines(TrainerCallback):
    """A line on stderr for everything that is logged, where there is no terminal for a bar."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "train_runtime" not in logs:  # the summary of the host
            tqdm.write(format_log(state.global_step, state.max_steps, logs), file=sys.stderr)


def format_log(update: int, num_updates: int, logs: Mapping[str, Any]) -> str:
    """
    Write what was logged after an optimizer step as a line.

    Args:
        update (`int`): how many there were.
        num_updates (`int`): how many there will be.
        logs (`Mapping[str, Any]`): what was logged.

    Returns:
        `str`.
    """
    shown = {name: value for name, value in logs.items() if not name.endswith(_INCIDENTAL)}
    texts = (f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in shown.items())
    return f"step {update} of {num_updates}: {', '.join(texts)}"


def show_progress(trainer: Trainer, *values: str, bar: bool = True, show: bool = True) -> None:
    """
    Show how far a training is in place of the host's own bar and log lines.

    Args:
        trainer (`transformers.Trainer`): the trainer.
        values (`str`): names of logged values for the bar.
        bar (`bool`): whether to draw a bar, instead of a line for each log.
        show (`bool`): whether to show anything.
    """
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    if show:
        trainer.add_callback(UpdateBar(*values) if bar else UpdateLines())
