"""A batch on its way: what the collator makes of records, and what of it an optimizer step trains on."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch

from .states import DraftBlocks


@dataclass
class TrainingBatch:
    """
    The records of a batch, padded to one shape.

    Everything is padded on the right with 0. The data loaders of transformers and accelerate rebuild a batch from what
    `columns` gives (when they move, slice or join it), so that it travels as such and is `TrainingBatch(**columns)`
    again when it has arrived.

    Attributes:
        clean_ids (`torch.LongTensor` of shape `(batch_size, clean_length)`): each prompt followed by its response.
        clean_mask (`torch.LongTensor` of shape `(batch_size, clean_length)`): 1 on tokens, 0 on padding.
        prompt_lengths (`torch.LongTensor` of shape `(batch_size,)`): tokens of each prompt.
        response_ids (`torch.LongTensor` of shape `(batch_size, response_length)`): the responses alone.
        response_lengths (`torch.LongTensor` of shape `(batch_size,)`): tokens of each response.
        record_keys (`torch.LongTensor` of shape `(batch_size,)`): a number made of the record's tokens.
        candidates (`torch.IntTensor` of shape `(batch_size, num_blocks, num_states, block_size)`, *optional*): the
            states of each block in order, then the augmented ones, then the fixed point to the end; the last state is
            the fixed point of every block. All are 0 after the end of the response.
        num_candidates (`torch.LongTensor` of shape `(batch_size, num_blocks)`, *optional*): how many states of a block
            come before its fixed point.
        label_ids (`torch.LongTensor` of shape `(batch_size, label_length)`, *optional*): ground-truth answers, which
            the AR loss is on instead of the responses.
        label_lengths (`torch.LongTensor` of shape `(batch_size,)`, *optional*): tokens of each such answer.
    """

    clean_ids: torch.Tensor
    clean_mask: torch.Tensor
    prompt_lengths: torch.Tensor
    response_ids: torch.Tensor
    response_lengths: torch.Tensor
    record_keys: torch.Tensor
    candidates: torch.Tensor | None = None
    num_candidates: torch.Tensor | None = None
    label_ids: torch.Tensor | None = None
    label_lengths: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.clean_ids)

    def columns(self) -> dict[str, torch.Tensor]:
        """The tensors by name, without those that there are not."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def first_rows(self, count: int) -> TrainingBatch:
        """The batch with its first `count` records only."""
        return TrainingBatch(**{name: value[:count] for name, value in self.columns().items()})

    def anchors(self, offsets: torch.Tensor) -> torch.Tensor:
        """
        Find the positions of the tokens before places of the responses.

        Args:
            offsets (`torch.LongTensor` of shape `(batch_size, num_places)`): places in each response, from 0 on.

        Returns:
            `torch.LongTensor` of the same shape: positions in the clean sequences.
        """
        return self.prompt_lengths[:, None] - 1 + offsets

    @property
    def last_positions(self) -> torch.Tensor:
        """The position of each clean sequence's last token, of shape `(batch_size,)`."""
        return self.prompt_lengths + self.response_lengths - 1

    @property
    def ar_lengths(self) -> torch.Tensor:
        """How many tokens of each record the AR loss is on, of shape `(batch_size,)`."""
        return self.response_lengths if self.label_lengths is None else self.label_lengths


@dataclass
class PreparedBatch:
    """
    What of a batch an optimizer step trains on.

    Attributes:
        batch (`TrainingBatch`): the records.
        blocks (`DraftBlocks`): the states that were chosen or made.
        weights (`torch.Tensor` of shape `(batch_size, num_blocks, block_size)`): of the positions in the consistency
            loss, from `weigh_positions`.
        counts (`torch.Tensor` of shape `(2,)`): what the losses are means over, from `count_positions`.
    """

    batch: TrainingBatch
    blocks: DraftBlocks
    weights: torch.Tensor
    counts: torch.Tensor

    def without_counts(self) -> PreparedBatch:
        """The same for a batch whose forward pass must be run, but whose losses count nothing."""
        return replace(self, counts=torch.zeros_like(self.counts))
