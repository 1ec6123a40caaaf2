"""From trajectory records to the tensors of a training step."""

from __future__ import annotations

from typing import Any

import torch

from ..trajectories.schema import check_record, num_blocks


class TrajectoryCollator:
    """
    Draws one state of every block and pads the records of a batch to one shape.

    A state is drawn uniformly from all states before the fixed point and, where the records have them, the augmented
    states of the block, by torch's global generator.

    Args:
        block_size (`int`): tokens of a block.
        max_length (`int`, *optional*): longest prompt and response; a response that goes beyond it loses its last
            blocks.

    Raises:
        ValueError: on a call, for a record that is not a trajectory of that block size, or whose prompt leaves no room
            for a block.
    """

    def __init__(self, block_size: int, max_length: int | None = None):
        self.block_size = block_size
        self.max_length = max_length

    def __call__(self, records: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Args:
            records (`list[dict]`): trajectory records.

        Returns:
            `dict` of `torch.Tensor`: `clean_ids`, `clean_mask` and `labels` of shape `(batch_size, clean_length)`
            (`labels` is -100 outside the response), `states`, of shape `(batch_size, num_blocks, block_size)`,
            `consistency_mask` of the same shape (positions whose context holds a wrong draft token), `anchors` and
            `block_mask` of shape `(batch_size, num_blocks)`.
        """
        rows = [self._fit(record) for record in records]
        clean_length = max(len(prompt) + len(response) for prompt, response, _ in rows)
        most_blocks = max(len(blocks) for _, _, blocks in rows)
        batch_size = len(rows)
        clean_ids = torch.zeros((batch_size, clean_length), dtype=torch.long)
        clean_mask = torch.zeros_like(clean_ids)
        labels = torch.full_like(clean_ids, -100)
        states = torch.zeros((batch_size, most_blocks, self.block_size), dtype=torch.long)
        consistency_mask = torch.zeros_like(states, dtype=torch.bool)
        block_mask = torch.zeros((batch_size, most_blocks), dtype=torch.long)
        anchors = torch.zeros_like(block_mask)
        for row, (prompt, response, blocks) in enumerate(rows):
            length = len(prompt) + len(response)
            clean_ids[row, :length] = torch.tensor(prompt + response)
            clean_mask[row, :length] = 1
            labels[row, len(prompt) : length] = clean_ids[row, len(prompt) : length]
            block_mask[row, : len(blocks)] = 1
            anchors[row, : len(blocks)] = len(prompt) - 1 + self.block_size * torch.arange(len(blocks))
            drawn = torch.tensor([_draw_state(candidates) for candidates in blocks])
            fixed_points = torch.tensor([candidates[-1] for candidates in blocks])
            states[row, : len(blocks)] = drawn
            in_response = torch.arange(drawn.numel()).view_as(drawn) < len(response)
            consistency_mask[row, : len(blocks)] = wrong_context(drawn, fixed_points) & in_response
        return {
            "clean_ids": clean_ids,
            "clean_mask": clean_mask,
            "labels": labels,
            "states": states,
            "consistency_mask": consistency_mask,
            "anchors": anchors,
            "block_mask": block_mask,
        }

    def _fit(self, record: dict[str, Any]) -> tuple[list[int], list[int], list[list[list[int]]]]:
        check_record(record, self.block_size)
        prompt, response = list(record["prompt_ids"]), list(record["response_ids"])
        states = _with_augmented(record["states"], record.get("augmented_states"))
        room = None if self.max_length is None else self.max_length - len(prompt)
        if room is not None and room < len(response):
            if room < self.block_size:
                raise ValueError(
                    f"A prompt of {len(prompt)} tokens leaves no room for a block of {self.block_size} in "
                    f"`max_length={self.max_length}`. Raise `max_length` or drop record {record.get('data_id', '?')}."
                )
            response = response[: room - room % self.block_size]
            states = states[: num_blocks(len(response), self.block_size)]
        return prompt, response, states


def wrong_context(states: torch.Tensor, fixed_points: torch.Tensor) -> torch.Tensor:
    """
    Mark the positions whose context holds a wrong draft token.

    At the first wrong token itself the context is still right, so that the model's distribution there is the target.

    Args:
        states (`torch.LongTensor` of shape `(num_blocks, block_size)`): a state of each block.
        fixed_points (`torch.LongTensor` of shape `(num_blocks, block_size)`): where its trajectory ends.

    Returns:
        `torch.BoolTensor` of shape `(num_blocks, block_size)`.
    """
    num_wrong = (states != fixed_points).long().cumsum(-1)
    return torch.nn.functional.pad(num_wrong[..., :-1], (1, 0)) > 0


def _with_augmented(states: list[list[list[int]]], augmented: list[list[list[int]]] | None) -> list[list[list[int]]]:
    """What may be drawn for each block: its augmented states and its trajectory, with the fixed point at the end."""
    if augmented is None:
        return states
    return [[*extra, *trajectory] for extra, trajectory in zip(augmented, states)]


def _draw_state(candidates: list[list[int]]) -> list[int]:
    """A random state before the fixed point; the fixed point itself where the first draft already was it."""
    return candidates[int(torch.randint(max(len(candidates) - 1, 1), ()))]
