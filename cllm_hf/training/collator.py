"""From trajectory records to padded tensors. Nothing is drawn here: that is done anew for every update."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import torch

from ..trajectories.schema import check_record, num_blocks
from .checks import check_response, get_labels
from .states import cut_responses


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
            for a block, or that has no `label_ids` where they are wanted.
    """

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

    def __call__(self, records: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Args:
            records (`list[dict]`): trajectory records.

        Returns:
            `dict` of `torch.Tensor`:

            - `clean_ids` of shape `(batch_size, clean_length)`: prompt and response, padded on the right; `clean_mask`
              of the same shape, and `labels`, which is -100 outside the response.
            - `prompt_lengths`, `response_lengths` and `record_keys`, a number made of the record's tokens, all of
              shape `(batch_size,)`.
            - `candidates` of shape `(batch_size, num_blocks, num_states, block_size)`, int32: the states of each block
              in order, then the augmented ones, then the fixed point to the end, all with 0 behind the response;
              `num_candidates` of shape `(batch_size, num_blocks)`: how many are before that.
            - `label_ids` of shape `(batch_size, label_length)`: ground-truth answers, -100 behind them.
        """
        rows = [self._fit(record) for record in records]
        sequences = [prompt + response for prompt, response, _ in rows]
        clean_ids = _pad(sequences, 0)
        lengths = torch.tensor([len(sequence) for sequence in sequences])
        prompt_lengths = torch.tensor([len(prompt) for prompt, _, _ in rows])
        columns = torch.arange(clean_ids.shape[1])
        clean_mask = columns < lengths[:, None]
        batch = {
            "clean_ids": clean_ids,
            "clean_mask": clean_mask.long(),
            "labels": clean_ids.masked_fill(~clean_mask | (columns < prompt_lengths[:, None]), -100),
            "prompt_lengths": prompt_lengths,
            "response_lengths": lengths - prompt_lengths,
            "record_keys": torch.tensor([zlib.crc32(np.asarray(ids, dtype=np.int64).tobytes()) for ids in sequences]),
        }
        if self.with_states:
            batch |= _stack_candidates([blocks for _, _, blocks in rows], batch)
        if self.with_labels:
            batch["label_ids"] = _pad([self._fit_labels(record) for record in records], -100)
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


def _pad(rows: list[list[int]], fill: int) -> torch.Tensor:
    padded = np.full((len(rows), max(map(len, rows))), fill, dtype=np.int64)
    for number, row in enumerate(rows):
        padded[number, : len(row)] = row
    return torch.from_numpy(padded)


def _stack_candidates(blocks: list[list[list[list[int]]]], batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    most_blocks = max(map(len, blocks))
    most_states = max(len(states) for row in blocks for states in row) + 1
    block_size = len(blocks[0][0][0])
    fixed_points = cut_responses(batch["clean_ids"], batch["prompt_lengths"], most_blocks * block_size)
    fixed_points = fixed_points.view(len(blocks), most_blocks, 1, block_size)
    candidates = fixed_points.int().expand(-1, -1, most_states, -1).clone()
    num_candidates = torch.zeros(len(blocks), most_blocks, dtype=torch.long)
    for row, row_blocks in enumerate(blocks):
        for number, states in enumerate(row_blocks):
            candidates[row, number, : len(states)] = torch.from_numpy(np.asarray(states, dtype=np.int32))
            num_candidates[row, number] = len(states)
    # Behind the response states hold padding of any kind; there they shall be as right as the fixed point.
    in_response = torch.arange(most_blocks * block_size) < batch["response_lengths"][:, None]
    candidates *= in_response.view(len(blocks), most_blocks, 1, block_size)
    return {"candidates": candidates, "num_candidates": num_candidates}
