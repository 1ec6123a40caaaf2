"""
Training a lossless adapter: from the clean sequence before any place, draft the tokens after the next one.

In each step the base model runs the clean sequences once, without gradient and without the adapter; its logits are the
targets. Blocks of mask embeddings stand after some places of each response, as they do in decoding, and are run with
the adapter on the keys and values of the clean sequences. No gradient passes through those, so that this costs less
than one pass over both, and gives the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel

from ..blocks.drafter import AdapterGate, find_drafter
from ..blocks.forward import forward_clean, packed_forward
from ..blocks.layout import Packed, append_drafts
from .batch import TrainingBatch
from .objective import Objective, sum_divergence
from .states import position_weights


@dataclass
class PreparedDrafts:
    """What of a batch an optimizer step trains a drafter on."""

    batch: TrainingBatch
    # [B, num_blocks], tokens of the response before the one that is never drafted, since the base model itself says
    # it; the block drafts those after it.
    offsets: torch.Tensor
    weights: torch.Tensor  # [B, num_blocks, num_masks], of the drafted tokens; 0 after the end of the response
    counts: torch.Tensor  # [2], what the loss and the share of right tokens are means over


class DraftingObjective(Objective):
    """
    Chooses after which places of each response tokens are drafted, and sums the loss: as `ConsistencyObjective` does.

    A block is the token that is never drafted, and the drafted ones after it.
    """

    loss_names: ClassVar[tuple[str, str]] = ("drafting_loss", "draft_accuracy")
    second_weight: ClassVar[float] = 0.0  # tokens that are drafted right are counted, not minimised

    def prepare(
        self,
        model: torch.nn.Module,
        base_model: PreTrainedModel,
        batch: TrainingBatch,
        update: int | None,
        progress: float,
    ) -> PreparedDrafts:
        """Choose places, spread evenly over each response. The models are not used: drafts stand on it alone."""
        num_masks = self.size_at(progress) - 1
        lengths = batch.response_lengths
        num_places = (lengths - 1).clamp(min=1)  # the last token has none after it to draft
        num_blocks = num_places.clamp(max=self.config.drafts_per_response)
        numbers = torch.arange(int(num_blocks.max()), device=lengths.device)  # [num_blocks]
        draws = self.draw_numbers(batch, update, (len(numbers),))
        shares = (numbers + draws) / num_blocks[:, None]
        offsets = (shares * num_places[:, None]).long().clamp(max=num_places[:, None] - 1)
        places = offsets[..., None] + 1 + torch.arange(num_masks, device=lengths.device)
        is_drafted = (places < lengths[:, None, None]) & (numbers < num_blocks[:, None])[..., None]
        weights = position_weights(is_drafted, self.config.position_decay)
        return PreparedDrafts(batch, offsets, weights, weights.sum().expand(2).clone())

    def sum_losses(
        self, model: torch.nn.Module, base_model: PreTrainedModel, prepared: PreparedDrafts
    ) -> torch.Tensor:
        """
        Run the clean sequences and the drafted blocks, and sum the loss.

        Returns:
            `torch.Tensor` of shape `(2,)`: the divergence, and without gradient the tokens that are drafted right,
            each weighted and summed.
        """
        drafter: Any = find_drafter(base_model)
        gate = AdapterGate(base_model, drafter)
        batch, weights = prepared.batch, prepared.weights
        num_masks = weights.shape[-1]
        row, block, distance = weights.nonzero(as_tuple=True)
        # The place in the clean sequence whose logits a drafted token is to have.
        columns = batch.prompt_lengths[row] + prepared.offsets[row, block] + distance
        clean_places, targets_of = torch.unique(row * batch.clean_ids.shape[1] + columns, return_inverse=True)
        num_columns = weights.shape[1] * num_masks
        was_training = model.training
        model.eval()  # with gradient checkpointing, models in training mode take no cache
        gate.train_dropout(was_training)
        try:
            with gate.installed():
                with torch.no_grad():
                    targets, cache = forward_clean(
                        base_model, batch.clean_ids, batch.clean_mask, 1, places=clean_places
                    )
                gate.open(list(range(num_masks)) * weights.shape[1])
                packed = lay_out_blocks(batch, prepared.offsets, num_masks)
                places = row * num_columns + block * num_masks + distance
                logits = packed_forward(model, packed, base_model, places, cache)
        finally:
            model.train(was_training)
        logits = drafter.correct(logits, batch.clean_ids[row, columns])
        chosen = weights[row, block, distance]
        divergence = sum_divergence(logits, targets, targets_of, chosen, self.config)
        with torch.no_grad():
            num_right = ((logits.argmax(-1) == targets.argmax(-1)[targets_of]) * chosen).sum()
        return torch.stack([divergence, num_right])


def lay_out_blocks(batch: TrainingBatch, offsets: torch.Tensor, num_masks: int) -> Packed:
    """
    Lay out blocks of masks after places `[B, num_blocks]` of responses. Each mask sees the clean tokens before its
    block, and those before it in its block; the first stands for the token at its offset, which is yet to be said.
    """
    batch_size, num_blocks = offsets.shape
    first = (batch.prompt_lengths[:, None] + offsets)[..., None]  # [B, num_blocks, 1]
    distances = torch.arange(num_masks, device=offsets.device)
    positions = torch.minimum(first + distances, batch.last_positions[:, None, None])
    segments = 1 + torch.arange(num_blocks, device=offsets.device)[None, :, None].expand(batch_size, -1, num_masks)
    anchors = first.expand(-1, -1, num_masks)
    return append_drafts(
        batch.clean_ids,
        batch.clean_mask,
        torch.zeros_like(positions).flatten(1),
        positions.flatten(1),
        segments.flatten(1),
        anchors.flatten(1),
    )
