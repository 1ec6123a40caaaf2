"""From trajectory records to padded tensors. Nothing is drawn here: that is done anew for every optimizer step."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import torch

from ..blocks.layout import num_blocks
from ..trajectories.schema import check_record, check_response, check_tokens
from .batch import TrainingBatch
from .checks import get_labels


class TrajectoryCollator:
    """
    Pads the records of a batch to one shape.

    Args:
        block_size (`int`, *optional*): tokens of a block; by default what the first record has.
        max_length (`int`, *optional*): longest prompt and response; a response that goes beyond it loses its last
            blocks.
        with_states (`bool`): whether the states of the trajectories are wanted.
        with_augmented (`bool`): whether `augmented_states` are among them, where the records have them.
        with_labels (`bool`): whether ground-truth answers are wanted: the column `label_ids`.

    Raises:
        ValueError: on a call, for a record that is not a trajectory of that block size, whose prompt leaves no room
            for a block, that has no `label_ids` where they are wanted, or a token outside of `vocab_size`.

    Attributes:
        vocab_size (`int`, *optional*): tokens that the model has embeddings for; not known before it is loaded.
    """

    vocab_size: int | None = None

    def __init__(
        self,
        block_size: int | None,
        max_length: int | None = None,
        with_states: bool = True,
        with_augmented: bool = True,
        with_labels: bool = False,
    ):
        self.block_size = block_size
        self.max_length = max_length
        self.with_states = with_states
        self.with_augmented = with_augmented
        self.with_labels = with_labels

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
        """What `collate` gives, as the data loaders carry it: `TrainingBatch.columns`."""
        return self.collate(records).columns()

    def collate(self, records: list[dict[str, Any]]) -> TrainingBatch:
        """
        Pad some records to one shape.

        Args:
            records (`list[dict]`): trajectory records.

        Returns:
            `TrainingBatch`.
        """
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
        room = None if self.max_length is None else self.max_length - len(prompt)
        if room is not None and room < len(response):
            if room < size:
                raise ValueError(
                    f"A prompt of {len(prompt)} tokens leaves no room for a block of {size} in "
                    f"`max_length={self.max_length}`. Raise `max_length` or drop record {record.get('data_id', '?')}."
                )
            response = response[: room - room % size]
            blocks = blocks[: num_blocks(len(response), size)]
        return prompt, response, blocks

    def _fit_labels(self, record: dict[str, Any]) -> list[int]:
        room = None if self.max_length is None else max(self.max_length - len(record["prompt_ids"]), 1)
        return get_labels(record)[:room]


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
