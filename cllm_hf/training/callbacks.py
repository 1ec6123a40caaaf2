"""Callbacks of `CLLMTrainer`: one that notices when a model collapses, one that plots the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import TrainerCallback
from transformers.utils import logging

from .._host import base_model_of
from ..trajectories.responding import find_stop_ids
from .collapse import CollapseDetector, CollapseLimits, Sign, find_bad_data
from .plotting import PLOT_NAME, plot_run
from .resuming import EpochCallback, RunRecordCallback
from .saving import is_pushing, wait_for_push


logger = logging.get_logger(__name__)
_SAMPLE = 128  # records of the training data that are looked at


class CollapseCallback(TrainerCallback):
    """
    Warns when a model loses its quality, once for each sign, and can stop the training.

    Signs in training are an AR loss far above its lowest value, a loss that is not a number, and in evaluation
    agreement that falls, responses that repeat themselves more than the dataset's, and responses that are much
    shorter. What was over for a while and comes again gets another warning. All of these are logged by
    [`CLLMTrainer`], which adds this callback by itself unless `on_collapse` is `"ignore"`; add one with limits of
    your own to replace that.

    Before the training a sample of the data is looked at. Data that repeats itself, that has responses of one token,
    states of padding or nothing for the consistency loss gets a warning too, but stops nothing.

    Args:
        on_collapse (`str`, *optional*, defaults to `"warn"`): `"warn"`, or `"stop"` to end the training too; what is
            saved at its end is saved as always. Many runs are bad for a while and recover: what an evaluation shows
            stops a training only if the next one shows it too, and a high AR loss if three entries of the log in a row
            do. A loss that is not a number stops it at once.
        ar_loss_rise (`float`, *optional*, defaults to 1.0): in nats: the AR loss (the median of the last 3 logged)
            stands this much above its lowest value so far, and at more than twice that.
        agreement_drop (`float`, *optional*, defaults to 0.3): agreement has lost this share of its highest value.
        repetition_rise (`float`, *optional*, defaults to 0.3): the repetition rate of decoded responses is this much
            above that of the dataset's own, so that data that repeats itself by nature is no sign.
        response_share (`float`, *optional*, defaults to 0.25): decoded responses have less than this share of the
            tokens of the dataset's.

    Raises:
        ValueError: for another `on_collapse`, a limit that is not positive, or a share above 1.
    """

    def __init__(
        self,
        on_collapse: str = "warn",
        ar_loss_rise: float = 1.0,
        agreement_drop: float = 0.3,
        repetition_rise: float = 0.3,
        response_share: float = 0.25,
    ):
        if on_collapse not in ("warn", "stop"):
            raise ValueError(f'`on_collapse` of a callback must be "warn" or "stop", got {on_collapse!r}.')
        self.on_collapse = on_collapse
        self.limits = CollapseLimits(ar_loss_rise, agreement_drop, repetition_rise, response_share)
        self._detector = CollapseDetector(self.limits)
        self._warned: set[str] = set()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the data; a run that goes on from a checkpoint is compared with all that it has logged."""
        self._detector, self._warned = CollapseDetector(self.limits), set()
        for logs in state.log_history:
            self._detector.update(logs)
        if state.is_world_process_zero:
            self._warn(_look_at(args, **kwargs))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Look at what is logged, which is the same for every process, so that all of them stop together."""
        signs = self._detector.update(logs or {})
        if not signs:
            return
        if state.is_world_process_zero:
            self._warn(signs)
        if self.on_collapse == "stop" and any(sign.is_lasting for sign in signs):
            if state.is_world_process_zero and not control.should_training_stop:
                logger.warning(
                    '`on_collapse="stop"`: the training ends at update %d of %d, with the weights as they are now.',
                    state.global_step,
                    state.max_steps,
                )
            control.should_training_stop = True

    def _warn(self, signs: list[Sign]) -> None:
        for sign in signs:
            # What was over for a while is worth another warning; so is what a resumed run still shows.
            if sign.is_new or sign.kind not in self._warned:
                self._warned.add(sign.kind)
                logger.warning(sign.message)


class PlotCallback(TrainerCallback):
    """
    Draws the losses and what evaluation decoded over optimizer steps into `training.png` in `output_dir`.

    It is drawn anew after each evaluation, unless the last one is just being pushed to the Hub, and at the end. A plot
    that cannot be written gets a warning; the training goes on. [`CLLMTrainer`] adds this callback by itself unless
    `plot_run` is `False`.

    Args:
        trainer (`transformers.Trainer`, *optional*): its pushes are not disturbed.
    """

    def __init__(self, trainer: Any = None) -> None:
        self._trainer = trainer
        self._has_warned = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A plot of an earlier run in the same folder says nothing of this one."""
        if state.is_world_process_zero and state.global_step == 0:
            (Path(args.output_dir) / PLOT_NAME).unlink(missing_ok=True)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not is_pushing(self._trainer):
            self._draw(args, state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        wait_for_push(self._trainer)
        self._draw(args, state)

    def _draw(self, args: Any, state: Any) -> None:
        if not state.is_world_process_zero:
            return
        try:
            plot_run(state.log_history, Path(args.output_dir) / PLOT_NAME)
        except (OSError, ImportError) as error:  # a full disk, or no matplotlib
            if not self._has_warned:
                logger.warning(f"The plot of the run was not written ({error}). The training goes on without it.")
            self._has_warned = True


class PushCallback(TrainerCallback):
    """
    Lets a push of a checkpoint end before the files that it reads are written for the next.

    [`CLLMTrainer`] adds this callback by itself. With `hub_always_push=True` the host would write them at once;
    without it a checkpoint is not pushed at all while the one before is on its way.

    Args:
        trainer (`transformers.Trainer`): it pushes.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_push_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        wait_for_push(self._trainer)


def add_callbacks(trainer: Any) -> None:
    """
    Add the callbacks that a trainer always has, and those that its options ask for, unless it was given such itself.

    Args:
        trainer (`CLLMTrainer`): gets them.
    """
    trainer.add_callback(EpochCallback())
    trainer.add_callback(RunRecordCallback())
    given = trainer.callback_handler.callbacks
    can_collapse = not trainer.args.lossless and trainer.args.on_collapse != "ignore"  # the model is frozen there
    if can_collapse and not any(isinstance(one, CollapseCallback) for one in given):
        trainer.add_callback(CollapseCallback(trainer.args.on_collapse))
    if trainer.args.plot_run and not any(isinstance(one, PlotCallback) for one in given):
        trainer.add_callback(PlotCallback(trainer))
    trainer.add_callback(PushCallback(trainer))


def _look_at(args: Any, model: Any, train_dataloader: Any, processing_class: Any, **kwargs: Any) -> list[Sign]:
    """Signs in the training data; none for a stream, which would be read twice."""
    dataset = getattr(train_dataloader, "dataset", None)
    if not isinstance(dataset, Dataset):
        return []
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    count = min(_SAMPLE, len(dataset))
    records = [dataset[number * len(dataset) // count] for number in range(count)]
    has_states = getattr(args, "trajectory_source", "dataset") == "dataset"
    return find_bad_data(records, tokenizer.pad_token_id, find_stop_ids(base_model_of(model), tokenizer), has_states)
