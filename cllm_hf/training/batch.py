"""From trajectory records to padded tensors, and the share of them that each process trains on."""

from __future__ import annotations

import reprlib
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from ..blocks.layout import num_blocks
from ..trajectories.prompts import as_ids
from ..trajectories.schema import check_record, check_response, check_tokens
from .config import CLLMConfig


@dataclass
class TrainingBatch:
    """
    The records of a batch, padded to one shape: on the right, with 0.

    The data loaders of transformers and accelerate rebuild a batch from what `columns` gives (when they move, slice or
    join it), so that it travels as such and is `TrainingBatch(**columns)` again when it has arrived.
    """

    clean_ids: torch.Tensor  # [B, clean_length], each prompt followed by its response
    clean_mask: torch.Tensor  # [B, clean_length], 1 on tokens, 0 on padding
    prompt_lengths: torch.Tensor  # [B]
    response_ids: torch.Tensor  # [B, response_length], the responses alone
    response_lengths: torch.Tensor  # [B]
    record_keys: torch.Tensor  # [B], a number made of the record's tokens
    # [B, num_blocks, num_states, block_size]: the states of each block in order, then the augmented ones, then the
    # fixed point to the end; the last state is the fixed point of every block. All are 0 after the response.
    candidates: torch.Tensor | None = None
    num_candidates: torch.Tensor | None = None  # [B, num_blocks], states before the fixed point
    label_ids: torch.Tensor | None = None  # [B, label_length], ground-truth answers, which the AR loss is on then
    label_lengths: torch.Tensor | None = None  # [B]

    def __len__(self) -> int:
        return len(self.clean_ids)

    def columns(self) -> dict[str, torch.Tensor]:
        """The tensors by name, without those that are missing."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def first_rows(self, count: int) -> TrainingBatch:
        """The batch with its first `count` records only."""
        return TrainingBatch(**{name: value[:count] for name, value in self.columns().items()})

    def anchors(self, offsets: torch.Tensor) -> torch.Tensor:
        """Positions in the clean sequences of the tokens before places of the responses, both `[B, num_places]`."""
        return self.prompt_lengths[:, None] - 1 + offsets

    @property
    def last_positions(self) -> torch.Tensor:
        """The position of each clean sequence's last token, `[B]`."""
        return self.prompt_lengths + self.response_lengths - 1

    @property
    def ar_lengths(self) -> torch.Tensor:
        """How many tokens of each record the AR loss is on, `[B]`."""
        return self.response_lengths if self.label_lengths is None else self.label_lengths


def make_collator(config: CLLMConfig, block_size: int) -> TrajectoryCollator:
    """The collator of a run, for trajectories of a block size."""
    return TrajectoryCollator(
        block_size,
        config.max_length,
        with_states=config.trajectory_source == "dataset",
        # They stand in no order, so that none has a successor or a place in a schedule.
        with_augmented=config.consistency == "global" and config.state_sampling == "uniform",
        with_labels=config.ar_labels == "ground_truth",
    )


@dataclass
class TrajectoryCollator:
    """
    Pads the records of a batch to one shape. Nothing is drawn here: that is done anew for every optimizer step.

    A response that goes beyond `max_length` loses its last blocks.
    """

    block_size: int | None  # by default what the first record has
    max_length: int | None = None
    with_states: bool = True
    with_augmented: bool = True
    with_labels: bool = False
    vocab_size: int | None = None  # not known before the model is loaded

    @property
    def token_columns(self) -> list[str]:
        """Columns whose tokens go into a batch."""
        wanted = {
            "states": self.with_states,
            "augmented_states": self.with_states and self.with_augmented,
            "label_ids": self.with_labels,
        }
        return ["prompt_ids", "response_ids", *(name for name, is_wanted in wanted.items() if is_wanted)]

    def __call__(self, records: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """What `collate` gives, as the data loaders carry it."""
        return self.collate(records).columns()

    def collate(self, records: list[dict[str, Any]]) -> TrainingBatch:
        """Check the records and pad them to one shape."""
        batch = None
        try:
            batch = self._pad_together(records)
            is_within = self.vocab_size is None or _is_within(batch, self.vocab_size)
        except OverflowError:  # a token of more than 32 bits
            is_within = False
        if not is_within:
            for record in records:
                check_tokens(record, self.vocab_size or 2**31, self.token_columns)
        assert batch is not None
        return batch

    def _pad_together(self, records: list[dict[str, Any]]) -> TrainingBatch:
        rows = [self._fit(record) for record in records]
        sequences = [prompt + response for prompt, response, _ in rows]
        clean_ids, lengths = _pad(sequences)
        response_ids, response_lengths = _pad([response for _, response, _ in rows])
        batch = TrainingBatch(
            clean_ids=clean_ids,
            clean_mask=(torch.arange(clean_ids.shape[1]) < lengths[:, None]).long(),
            prompt_lengths=lengths - response_lengths,
            response_ids=response_ids,
            response_lengths=response_lengths,
            record_keys=torch.tensor([zlib.crc32(np.asarray(ids, dtype=np.int64).tobytes()) for ids in sequences]),
        )
        if self.with_states:
            blocks = [blocks for _, _, blocks in rows]
            batch.candidates, batch.num_candidates = _stack_candidates(blocks, response_ids, response_lengths)
        if self.with_labels:
            batch.label_ids, batch.label_lengths = _pad([self._fit_labels(record) for record in records])
        return batch

    def _fit(self, record: dict[str, Any]) -> tuple[list[int], list[int], list[list[list[int]]]]:
        """Prompt, response, and for each block its states before the fixed point."""
        check_response(record)
        prompt, response = list(record["prompt_ids"]), list(record["response_ids"])
        blocks: list[list[list[int]]] = []
        size = 1
        if self.with_states:
            size = check_record(record, self.block_size)
            augmented = record.get("augmented_states") if self.with_augmented else None
            blocks = [
                [*trajectory[:-1], *extra] or trajectory
                for trajectory, extra in zip(record["states"], augmented or [[]] * len(record["states"]))
            ]
        if self.max_length is not None and len(prompt) + len(response) > self.max_length:
            room = self.max_length - len(prompt)
            if room < size:
                raise no_room(len(prompt), size, self.max_length, f"record {record.get('data_id', '?')}")
            response = response[: room - room % size]
            blocks = blocks[: num_blocks(len(response), size)]
        return prompt, response, blocks

    def _fit_labels(self, record: dict[str, Any]) -> list[int]:
        room = None if self.max_length is None else max(self.max_length - len(record["prompt_ids"]), 1)
        return labels_of(record)[:room]


def _is_within(batch: TrainingBatch, vocab_size: int) -> bool:
    """Whether all tokens of a batch are in a vocabulary; in its padding stand zeros."""
    parts = [part for part in (batch.clean_ids, batch.candidates, batch.label_ids) if part is not None]
    return min(int(part.min()) for part in parts) >= 0 and max(int(part.max()) for part in parts) < vocab_size


def _pad(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows, padded on the right with 0, and their lengths."""
    lengths = torch.tensor([len(row) for row in rows])
    padded = np.zeros((len(rows), int(lengths.max())), dtype=np.int64)
    for number, row in enumerate(rows):
        padded[number, : len(row)] = row
    return torch.from_numpy(padded), lengths


def _stack_candidates(
    blocks: list[list[list[list[int]]]], response_ids: torch.Tensor, response_lengths: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`candidates` and `num_candidates` of a `TrainingBatch`."""
    most_blocks = max(map(len, blocks))
    most_states = max(len(states) for row in blocks for states in row) + 1
    block_size = len(blocks[0][0][0])
    fixed_points = torch.nn.functional.pad(response_ids, (0, most_blocks * block_size - response_ids.shape[1]))
    fixed_points = fixed_points.view(len(blocks), most_blocks, 1, block_size)
    candidates = fixed_points.int().expand(-1, -1, most_states, -1).clone()
    num_candidates = torch.zeros(len(blocks), most_blocks, dtype=torch.long)
    for row, row_blocks in enumerate(blocks):
        for number, states in enumerate(row_blocks):
            candidates[row, number, : len(states)] = torch.from_numpy(np.asarray(states, dtype=np.int32))
            num_candidates[row, number] = len(states)
    # After the response states hold padding of any kind; there they shall be as right as the fixed point.
    in_response = torch.arange(most_blocks * block_size) < response_lengths[:, None]
    candidates *= in_response.view(len(blocks), most_blocks, 1, block_size)
    return candidates, num_candidates


def no_room(prompt_length: int, least: int, max_length: int, place: str) -> ValueError:
    return ValueError(
        f"A prompt of {prompt_length} tokens leaves no room for a block of {least} in `max_length={max_length}`, in "
        f"{place}. Raise `max_length`, or drop such records with `dataset.filter`."
    )


def labels_of(record: Mapping[str, Any]) -> list[int]:
    """The ground-truth answer of a record."""
    given = record.get("label_ids")
    if given is None or not len(given):
        raise ValueError(
            f'`ar_labels="ground_truth"` needs tokens in the column `label_ids`, got none in record '
            f'{record.get("data_id", "?")}. Add the column with `dataset.map`, or use `ar_labels="response"`.'
        )
    ids = as_ids(given)
    if ids is None:
        raise ValueError(
            f"`label_ids` must be a list of token ids, got {reprlib.repr(given)} in record "
            f"{record.get('data_id', '?')}. Tokenize them with `dataset.map`."
        )
    return ids


def count_own_rows(num_rows: int, accelerator: Accelerator, drop_last: bool = False) -> int:
    """
    Count the records of the batch fetched last that are not repeated to fill it up, so that none of an epoch counts
    twice: the first ones; 0 for a process that has repeated records only.

    The data loader repeats records from the start of the epoch until every process has a full batch. Those of the last
    round lie in order over the processes, so that what is left of the dataset comes first and the repeated ones after
    it. Of a dataset without a length it is not known what was repeated, and all count.
    """
    state: Any = accelerator.gradient_state
    # In this order: outside of a run, another run's options may have taken the processes' state away.
    if drop_last or not state.end_of_dataloader or accelerator.num_processes == 1:
        return num_rows
    try:
        num_records = len(state.active_dataloader.dataset)
    except TypeError:  # a shard of a stream has a `__len__` that fails
        return num_rows
    num_left = num_records % (num_rows * accelerator.num_processes) or num_rows * accelerator.num_processes
    return min(max(num_left - num_rows * accelerator.process_index, 0), num_rows)
