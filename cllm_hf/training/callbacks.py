"""What is said of a training while it runs: signs that the model loses its quality, and how far it is."""

from __future__ import annotations

import math
import sys
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from datasets import Dataset
from tqdm.auto import tqdm
from transformers import ProgressCallback, Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging

from .._host import base_model_of
from ..trajectories.responding import find_stop_ids
from .monitoring import count_repeated


logger = logging.get_logger(__name__)

_LOSSES = ("loss", "consistency_loss", "ar_loss")
_DECODING = ("agreement", "repetition", "response_tokens")
_RECENT = 3  # logged values of the AR loss whose median counts, so that one bad batch does not
_LASTING = 3  # entries of the log in a row
_SAMPLE = 128  # records of the training data that are looked at
_REMEDY = "Lower `learning_rate`, raise `ar_loss_weight`, or clean the dataset (`cllm_hf.CleaningRules`)."
_CLEAN = "Clean the dataset, as `TrajectoryBuilder(cleaning=cllm_hf.CleaningRules())` does."
# What transformers logs beside what was learned.
_INCIDENTAL = ("runtime", "_per_second", "total_flos", "epoch", "num_tokens")


@dataclass(frozen=True)
class Sign:
    """Something that was seen."""

    kind: str
    message: str  # what was seen and what to do, for people
    is_new: bool = True  # whether it was not there the last time
    # Many runs are bad for a while when the learning rate is at its highest: what an evaluation shows lasts if the
    # next one shows it too, a high AR loss if three entries of the log in a row do. A loss that is no number does not
    # come back.
    is_lasting: bool = False


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
        self._limits = (ar_loss_rise, agreement_drop, repetition_rise, response_share)
        self._detector = CollapseDetector(*self._limits)
        self._warned: set[str] = set()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the data; a run that goes on from a checkpoint is compared with all that it has logged."""
        self._detector, self._warned = CollapseDetector(*self._limits), set()
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
                    '`on_collapse="stop"`: the training ends at optimizer step %d of %d, with its weights of now.',
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


@dataclass
class CollapseDetector:
    """Follows a run by what it logs; the limits are those of [`CollapseCallback`]."""

    ar_loss_rise: float = 1.0
    agreement_drop: float = 0.3
    repetition_rise: float = 0.3
    response_share: float = 0.25

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            most = math.inf if name == "ar_loss_rise" else 1.0
            if not 0 < value <= most:
                raise ValueError(
                    f"`{name}` must be above 0 and at most {most:g}, got {value!r}. Leave it out for the default."
                )
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._lowest: float | None = None
        self._agreements: dict[str, float] = {}  # highest so far, by name
        self._times: Counter[str] = Counter()  # that a value was bad, in a row, by name

    def update(self, logs: Mapping[str, Any]) -> list[Sign]:
        """What an entry of the log shows, of training or evaluation and with any prefix."""
        values = {name: float(value) for name, value in logs.items() if isinstance(value, int | float)}
        return [*self._not_finite(values), *self._high_loss(values), *self._bad_decoding(values)]

    def _not_finite(self, values: Mapping[str, float]) -> Iterator[Sign]:
        for name, value in values.items():
            if not math.isfinite(value) and any(name == loss or name.endswith(f"_{loss}") for loss in _LOSSES):
                self._times["loss"] += 1
                yield Sign(
                    "not_finite",
                    f"`{name}` is {value}: the weights are lost. Begin again from the last good checkpoint with a "
                    "lower `learning_rate`, a `max_grad_norm`, or `bf16` instead of `fp16`.",
                    is_new=self._times["loss"] == 1,
                    is_lasting=True,
                )
                return

    def _high_loss(self, values: Mapping[str, float]) -> Iterator[Sign]:
        loss = values.get("ar_loss", math.nan)
        if not math.isfinite(loss) or values.get("ar_tokens") == 0:  # a mean over nothing
            return
        self._recent.append(loss)
        recent, lowest = median(self._recent), self._lowest
        self._lowest = recent if lowest is None else min(lowest, recent)
        is_high = lowest is not None and recent > max(lowest + self.ar_loss_rise, 2 * lowest)
        self._times["ar_loss"] = self._times["ar_loss"] + 1 if is_high else 0
        if is_high:
            yield Sign(
                "ar_loss",
                f"`ar_loss` has risen to {recent:.3g}, from {lowest:.3g} at its lowest: the model forgets the text it "
                f"should write. {_REMEDY}",
                is_new=self._times["ar_loss"] == 1,
                is_lasting=self._times["ar_loss"] >= _LASTING,
            )

    def _bad_decoding(self, values: Mapping[str, float]) -> Iterator[Sign]:
        """What decoding in evaluation shows, under the name of every evaluation dataset."""
        for name, value in values.items():
            kind = next((kind for kind in _DECODING if name.endswith(f"_{kind}")), None)
            if kind is None or name.endswith(f"_target_{kind}"):
                continue
            found = self._judge_decoding(kind, name, value, values.get(f"{name.removesuffix(kind)}target_{kind}", 0.0))
            self._times[name] = self._times[name] + 1 if found else 0
            if found:
                times = self._times[name]
                yield Sign(kind, f"`{name}` is {found} {_REMEDY}", is_new=times == 1, is_lasting=times > 1)

    def _judge_decoding(self, kind: str, name: str, value: float, target: float) -> str | None:
        if kind == "agreement":
            highest = self._agreements[name] = max(value, self._agreements.get(name, 0.0))
            if value < (1 - self.agreement_drop) * highest:
                earlier = f"{value:.1%}, after {highest:.1%} earlier in the run"
                return f"{earlier}: the model no longer says what the target model does."
        elif kind == "repetition":
            if value > target + self.repetition_rise:
                return f"{value:.1%}, of the dataset's responses {target:.1%}: the model repeats itself."
        elif value < self.response_share * target:
            return f"{value:.1f}, of the dataset's responses {target:.1f}: the model stops far too early."
        return None


def find_bad_data(
    records: Iterable[Mapping[str, Any]],
    pad_id: int | None = None,
    stop_ids: Collection[int] = (),
    has_states: bool = True,
) -> list[Sign]:
    """
    Look through a sample of records for what teaches a model to repeat itself, to stop at once, or nothing.

    Without `has_states` the model is not trained on the states of the records.
    """
    num_records = num_short = num_repeated = num_ngrams = num_states = num_padding = num_useful = 0
    for record in records:
        response = [int(token) for token in record["response_ids"]]
        num_records += 1
        num_short += len(response) - (response[-1:] != [] and response[-1] in stop_ids) <= 1
        repeated, ngrams = count_repeated(response)
        num_repeated, num_ngrams = num_repeated + repeated, num_ngrams + ngrams
        for state, fixed_point in _drafts(record, response) if has_states else ():
            num_states += 1
            num_padding += set(state) == {pad_id} != set(fixed_point)
            # Positions after a wrong token are what the consistency loss is on.
            num_useful += state[:-1] != fixed_point[:-1]
    found = {}
    if num_short > num_records / 2:
        found["data_one_token"] = (
            f"{num_short} of {num_records} responses of the training data have a single token: a block of one token "
            "has nothing to predict ahead, and the model learns to stop at once. Collect longer responses, or leave "
            "these out with `dataset.filter`."
        )
    if num_repeated > num_ngrams / 2:
        found["data_repetition"] = (
            f"The responses of the training data repeat themselves: {num_repeated / num_ngrams:.1%} of their "
            f"4-token sequences stood earlier in the same response. {_CLEAN}"
        )
    if num_padding > num_states / 2:
        found["data_padding"] = (
            f"{num_padding} of {num_states} states of the training data hold nothing but padding, which decoding "
            "never drafts. Build the dataset again with `cllm_hf.TrajectoryBuilder`."
        )
    if has_states and num_records and not num_useful:
        found["data_no_positions"] = (
            "No state of the training data has a token after a wrong one, so that the consistency loss is over "
            "nothing and the model gains no speed. Build the dataset with longer responses or a larger `block_size`."
        )
    return [Sign(kind, message) for kind, message in found.items()]


def _drafts(record: Mapping[str, Any], response: list[int]) -> Iterator[tuple[list[int], list[int]]]:
    """The states of all blocks that are trained on, each with its fixed point, without what stands after the end."""
    augmented: Sequence[Any] = record.get("augmented_states") or [[]] * len(record["states"])
    start = 0
    for trajectory, extra in zip(record["states"], augmented):
        fixed_point = response[start : start + len(trajectory[-1])]
        start += len(trajectory[-1])
        for state in [*extra, *trajectory[:-1]]:
            yield [int(token) for token in state][: len(fixed_point)], fixed_point


class UpdateBar(TrainerCallback):
    """A progress bar over optimizer steps that shows logged values by name, and a line for each evaluation."""

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
        if logs and "train_runtime" not in logs:  # the summary of transformers
            tqdm.write(format_log(state.global_step, state.max_steps, logs), file=sys.stderr)


def format_log(update: int, num_updates: int, logs: Mapping[str, Any]) -> str:
    """Write what was logged after an optimizer step as a line."""
    shown = {name: value for name, value in logs.items() if not name.endswith(_INCIDENTAL)}
    texts = (f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in shown.items())
    return f"step {update} of {num_updates}: {', '.join(texts)}"


def show_progress(trainer: Trainer, *values: str, bar: bool = True, show: bool = True) -> None:
    """Show how far a training is in place of transformers' own bar and log lines, with these values in the bar."""
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    if show:
        trainer.add_callback(UpdateBar(*values) if bar else UpdateLines())
