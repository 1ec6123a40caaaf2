"""Recomputing transitions of a dataset by plain forward passes, to see that they are what the model does."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .._host import input_device, plain_positions
from ..blocks.rules import gap_to_best, near_tie_bound
from ..cards import format_table
from .schema import REQUIRED_COLUMNS, check_names, lay_out


_FAILURES_SHOWN = 20


@dataclass(frozen=True)
class TransitionFailure:
    """A transition that the model makes otherwise, at the position where it is furthest from making it."""

    data_id: str  # of the record, or its number if it has none
    block: int  # number of the block in the response
    state: int  # number of the state that was fed
    position: int  # in the block
    expected: int  # token of the next state in the dataset
    got: int  # token that the model predicts
    gap: float  # how far the logit of `got` lies above that of `expected`
    # Whether rounding alone can cause the gap in the dtype of the model, by the rule of `blocks.rules`, here and at
    # all other positions. Then the transition holds.
    is_near_tie: bool


@dataclass(frozen=True)
class VerificationReport:
    """What came out of recomputing transitions."""

    num_transitions: int  # of the whole dataset
    num_requested: int  # how many were to be checked
    num_checked: int  # how many were; less where the dataset has no more
    seed: int  # of the draw
    failures: list[TransitionFailure] = field(default_factory=list)  # in the order of the dataset
    near_ties: list[TransitionFailure] = field(default_factory=list)  # what holds but for rounding

    @property
    def num_held(self) -> int:
        """Transitions that the model makes just so, or up to near ties."""
        return self.num_checked - len(self.failures)


@torch.no_grad()
def verify_transitions(
    model: PreTrainedModel, dataset: Dataset, count: int = 1000, seed: int = 0, show_progress: bool = False
) -> VerificationReport:
    """
    Recompute transitions of a dataset, drawn at random without replacement, each by one plain forward pass.

    A transition leads from a state of a block to the next one, and from the fixed point to itself. Its forward sees
    the prompt, the response before the block and the state, in a batch of one, without a cache or a mask: nothing is
    shared with the packed forward passes that built the dataset. Positions after the end of the response mean nothing
    and are not compared. At a near tie a token holds that is not the best one. Blocks of a single state in records
    whose `is_greedy` is false are no trajectories and are left out.
    """
    if count < 1:
        raise ValueError(f"`count` must be at least 1, got {count}. 1000 transitions say much about any dataset.")
    per_record, block_size = count_transitions(dataset)
    ends = np.cumsum(per_record)
    total = int(ends[-1])
    drawn = sorted(random.Random(seed).sample(range(total), min(count, total)))
    rows = np.searchsorted(ends, drawn, side="right")
    columns = [name for name in ("data_id", *REQUIRED_COLUMNS, "is_greedy") if name in dataset.column_names]
    records = dataset.with_format(None).select_columns(columns)
    was_training = model.training
    found: dict[bool, list[TransitionFailure]] = {False: [], True: []}  # by whether they are near ties
    model.eval()
    try:
        with tqdm(total=len(drawn), desc="Verifying", unit="transition", disable=not show_progress) as bar:
            for row, numbers in _by_row(rows, np.asarray(drawn) - (ends - per_record)[rows]):
                for difference in _check_record(model, records[row], row, numbers, block_size):
                    found[difference.is_near_tie].append(difference)
                bar.update(len(numbers))
                bar.set_postfix(failed=len(found[False]))
    finally:
        model.train(was_training)
    return VerificationReport(total, count, len(drawn), seed, found[False], found[True])


def count_transitions(dataset: Dataset) -> tuple[np.ndarray, int]:
    """The number of transitions of every record, without making Python objects of its states, and the block size."""
    check_names(dataset.column_names)
    counts, block_size = [np.zeros(0, dtype=np.int64)], None
    for size, arrays in lay_out(dataset):
        block_size = size
        owners = arrays.record_of_block
        # Each state is left once, also the fixed point, which leads to itself.
        is_alone = (arrays.num_states == 1) & ~arrays.is_greedy[owners]
        transitions = np.where(is_alone, 0, arrays.num_states)
        counts.append(np.bincount(owners, transitions, minlength=len(arrays.num_blocks)).astype(np.int64))
    per_record = np.concatenate(counts)
    if not per_record.sum():
        raise ValueError(f"The dataset must have transitions to check, got none in its {len(per_record)} records.")
    assert block_size is not None
    return per_record, block_size


def format_verification(report: VerificationReport) -> str:
    """A line on what came out of recomputing transitions, and a table of what does not hold."""
    drawn = f"{report.num_checked} of {report.num_transitions} transitions, drawn at random with seed {report.seed},"
    if report.num_checked == report.num_transitions:
        drawn = f"All {report.num_transitions} transitions"
        if report.num_checked < report.num_requested:
            drawn += f" (there are fewer than the {report.num_requested} asked for)"
    text = f"{drawn} were recomputed by plain forward passes: {report.num_held} hold, {len(report.failures)} do not."
    if report.near_ties:
        held = "One of those that hold does" if len(report.near_ties) == 1 else f"{len(report.near_ties)} that hold do"
        text += f" {held} so up to near ties, which the rounding of this dtype can turn over."
    if not report.failures:
        return text
    shown = report.failures[:_FAILURES_SHOWN]
    header = ("data_id", "block", "state", "position", "in the dataset", "the model's", "gap of logits")
    rows = [
        (
            *map(str, (failure.data_id, failure.block, failure.state, failure.position)),
            *map(str, (failure.expected, failure.got)),
            f"{failure.gap:.3g}",
        )
        for failure in shown
    ]
    left_out = len(report.failures) - len(shown)
    parts = [text, "", format_table(header, rows), *([f"And {left_out} more."] if left_out else [])]
    return "\n".join(parts)


def _by_row(rows: np.ndarray, numbers: np.ndarray) -> Iterator[tuple[int, list[int]]]:
    """Each row once, with the numbers of its drawn transitions."""
    unique, firsts = np.unique(rows, return_index=True)
    for row, own in zip(unique.tolist(), np.split(numbers, firsts[1:])):
        yield row, own.tolist()


def _check_record(
    model: PreTrainedModel, record: dict[str, Any], row: int, numbers: list[int], block_size: int
) -> list[TransitionFailure]:
    """Where the model differs in some transitions of a record, which are counted through its blocks."""
    is_greedy = record.get("is_greedy") is not False
    places = [
        (block, state)
        for block, states in enumerate(record["states"])
        for state in range(len(states) if is_greedy or len(states) > 1 else 0)
    ]
    _check_vocabulary(model, record, row)
    device, differences = input_device(model), []
    for number in numbers:
        block, state = places[number]
        states, start = record["states"][block], block * block_size
        length = min(block_size, len(record["response_ids"]) - start)
        fed = record["prompt_ids"] + record["response_ids"][:start] + states[state][:-1]
        ids = torch.tensor([fed], device=device)
        logits = model(ids, **plain_positions(model, ids), use_cache=False).logits[0, -block_size:][:length]
        following = torch.tensor(states[min(state + 1, len(states) - 1)][:length], device=logits.device)
        if not logits.argmax(-1).equal(following):
            place = (str(record.get("data_id", row)), block, state)
            differences.append(_difference(place, logits, following, model.dtype))
    return differences


def _difference(
    place: tuple[str, int, int], logits: torch.Tensor, following: torch.Tensor, dtype: torch.dtype
) -> TransitionFailure:
    """`logits` of shape `(length, vocab_size)`, `following` of shape `(length,)`."""
    got = logits.argmax(-1)
    gaps, bounds = gap_to_best(logits, following), near_tie_bound(logits, dtype)
    # Positions have bounds of their own. An exact tie that is broken another way has no gap, but differs.
    worst = int((gaps - bounds).masked_fill(got == following, -math.inf).argmax())
    return TransitionFailure(
        *place,
        position=worst,
        expected=int(following[worst]),
        got=int(got[worst]),
        gap=gaps[worst].item(),
        is_near_tie=bool(gaps[worst] <= bounds[worst]),
    )


def _check_vocabulary(model: PreTrainedModel, record: dict[str, Any], row: int) -> None:
    size = model.get_input_embeddings().num_embeddings
    states = (token for block in record["states"] for state in block for token in state)
    ids = {*record["prompt_ids"], *record["response_ids"], *states}
    if min(ids) < 0 or max(ids) >= size:
        outside = max(ids) if max(ids) >= size else min(ids)
        raise ValueError(
            f"Every token of the dataset must be in the model's vocabulary of {size}, got {outside} in record "
            f"{record.get('data_id', row)}. Pass the model that the dataset was built with."
        )
