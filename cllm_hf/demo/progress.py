"""What the demo shows while it works."""

from __future__ import annotations

import time
from typing import Any

from tqdm.auto import tqdm
from transformers import ProgressCallback, Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback


class UpdateBar(TrainerCallback):
    """A progress bar over updates that shows one logged value."""

    def __init__(self, value: str):
        self.value = value
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar = tqdm(total=state.max_steps, desc="Training", unit="update")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and self.value in logs:
            self.bar.set_postfix({self.value: f"{float(logs[self.value]):.3f}"})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()


def show_progress(trainer: Trainer, value: str) -> None:
    """Draw an `UpdateBar` in place of the host's own bar and log lines."""
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(UpdateBar(value))


class Clock:
    """Time of each step, in seconds, in `laps`."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._start = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = now - self._start
        self._start = now
