"""Signs that a model loses its quality in training, or that its data will make it, read from what is logged."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from .monitoring import count_repeated


_LOSSES = ("loss", "consistency_loss", "ar_loss")
_DECODING = ("agreement", "repetition", "response_tokens")
_RECENT = 3  # logged values of the AR loss whose median counts, so that one bad batch does not
_LASTING = 3  # entries of the log in a row
_REMEDY = "Lower `learning_rate`, raise `ar_loss_weight`, or clean the dataset (`cllm_hf.CleaningRules`)."
_CLEAN = "Clean the dataset, as `TrajectoryBuilder(cleaning=cllm_hf.CleaningRules())` does."


@dataclass(frozen=True)
class Sign:
    """
    Something that was seen.

    Attributes:
        kind (`str`): what it is a sign of.
        message (`str`): what was seen and what to do, for people.
        is_new (`bool`): whether it was not there the last time.
        is_lasting (`bool`): whether it is there to stay. Many runs are bad for a while when the learning rate is at
            its highest: what an evaluation shows lasts if the next one shows it too, a high AR loss if three entries
            of the log in a row do. A loss that is no number does not come back.
    """

    kind: str
    message: str
    is_new: bool = True
    is_lasting: bool = False


@dataclass(frozen=True)
class CollapseLimits:
    """
    From where on a logged value is a sign of collapse.

    Args:
        ar_loss_rise (`float`, *optional*, defaults to 1.0): in nats: the AR loss (the median of the last 3 logged)
            stands this much above its lowest value so far, and at more than twice that.
        agreement_drop (`float`, *optional*, defaults to 0.3): agreement has lost this share of its highest value.
        repetition_rise (`float`, *optional*, defaults to 0.3): the repetition rate of decoded responses is this much
            above that of the dataset's own, so that data that repeats itself by nature is no sign.
        response_share (`float`, *optional*, defaults to 0.25): decoded responses have less than this share of the
            tokens of the dataset's.

    Raises:
        ValueError: for a limit that is not positive, or a share above 1.
    """

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


class CollapseDetector:
    """
    Follows a run by what it logs.

    Args:
        limits (`CollapseLimits`, *optional*): from where on a value is a sign.
    """

    def __init__(self, limits: CollapseLimits | None = None):
        self.limits = limits or CollapseLimits()
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._lowest: float | None = None
        self._agreements: dict[str, float] = {}  # highest so far, by name
        self._times: Counter[str] = Counter()  # that a value was bad, in a row, by name

    def update(self, logs: Mapping[str, Any]) -> list[Sign]:
        """
        Take one entry of the log.

        Args:
            logs (`Mapping[str, Any]`): names and values, as `CLLMTrainer` logs them in training or evaluation, with
                any prefix.

        Returns:
            `list[Sign]`: what it shows.
        """
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
        is_high = lowest is not None and recent > max(lowest + self.limits.ar_loss_rise, 2 * lowest)
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
            target = values.get(f"{name.removesuffix(kind)}target_{kind}", 0.0)
            message = {
                "agreement": self._low_agreement,
                "repetition": self._repetition,
                "response_tokens": self._short,
            }[kind](name, value, target)
            self._times[name] = self._times[name] + 1 if message else 0
            if message:
                times = self._times[name]
                yield Sign(kind, f"`{name}` is {message} {_REMEDY}", is_new=times == 1, is_lasting=times > 1)

    def _low_agreement(self, name: str, agreement: float, target: float) -> str | None:
        highest = self._agreements[name] = max(agreement, self._agreements.get(name, 0.0))
        if agreement >= (1 - self.limits.agreement_drop) * highest:
            return None
        return (
            f"{agreement:.1%}, after {highest:.1%} earlier in the run: the model no longer says what the target model "
            "does."
        )

    def _repetition(self, name: str, rate: float, target: float) -> str | None:
        if rate <= target + self.limits.repetition_rise:
            return None
        return f"{rate:.1%}, of the dataset's responses {target:.1%}: the model repeats itself."

    def _short(self, name: str, length: float, target: float) -> str | None:
        if length >= self.limits.response_share * target:
            return None
        return f"{length:.1f}, of the dataset's responses {target:.1f}: the model stops far too early."


def find_bad_data(
    records: Iterable[Mapping[str, Any]],
    pad_id: int | None = None,
    stop_ids: Collection[int] = (),
    has_states: bool = True,
) -> list[Sign]:
    """
    Look for records that teach a model to repeat itself, to stop at once, or nothing.

    Args:
        records (`Iterable[Mapping]`): trajectory records, a sample of the dataset.
        pad_id (`int`, *optional*): the padding token.
        stop_ids (`Collection[int]`): tokens that end a response.
        has_states (`bool`): whether the model is trained on the states of the records.

    Returns:
        `list[Sign]`: empty for good data, and without records.
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
    signs = []
    if num_short > num_records / 2:
        signs.append(
            Sign(
                "data_one_token",
                f"{num_short} of {num_records} responses of the training data have a single token: a block of one "
                f"token has nothing to predict ahead, and the model learns to stop at once. Collect longer responses, "
                "or leave these out with `dataset.filter`.",
            )
        )
    if num_repeated > num_ngrams / 2:
        signs.append(
            Sign(
                "data_repetition",
                f"The responses of the training data repeat themselves: {num_repeated / num_ngrams:.1%} of their "
                f"4-token sequences stood earlier in the same response. {_CLEAN}",
            )
        )
    if num_padding > num_states / 2:
        signs.append(
            Sign(
                "data_padding",
                f"{num_padding} of {num_states} states of the training data hold nothing but padding, which decoding "
                "never drafts. Build the dataset again with `cllm_hf.TrajectoryBuilder`.",
            )
        )
    if has_states and num_records and not num_useful:
        signs.append(
            Sign(
                "data_no_positions",
                "No state of the training data has a token after a wrong one, so that the consistency loss is over "
                "nothing and the model gains no speed. Build the dataset with longer responses or a larger "
                "`block_size`.",
            )
        )
    return signs


def _drafts(record: Mapping[str, Any], response: list[int]) -> Iterator[tuple[list[int], list[int]]]:
    """The states of all blocks that are trained on, each with its fixed point, without what stands after the end."""
    augmented: Sequence[Any] = record.get("augmented_states") or [[]] * len(record["states"])
    start = 0
    for trajectory, extra in zip(record["states"], augmented):
        fixed_point = response[start : start + len(trajectory[-1])]
        start += len(trajectory[-1])
        for state in [*extra, *trajectory[:-1]]:
            yield [int(token) for token in state][: len(fixed_point)], fixed_point
