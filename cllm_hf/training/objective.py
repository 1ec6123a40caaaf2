"""The loss of a batch: one packed forward, and sums of both losses over their positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ..blocks.forward import packed_forward
from ..blocks.layout import Drafts, PackedBatch, fill_rows, pack
from .losses import DIVERGENCES, ar_cross_entropy
from .states import DraftBlocks, cut_responses, position_weights, tokens_at, wrong_context


# Positions whose probabilities are held at once: those of a vocabulary of 150,000 take 0.6 GiB in float32.
_POSITIONS_AT_ONCE = 1024


@dataclass(frozen=True)
class Objective:
    """
    What is minimised.

    Attributes:
        divergence (`str`): name of one of `losses.DIVERGENCES`.
        temperature (`float`): of the divergence.
        label_smoothing (`float`): of the AR loss.
        position_decay (`float`, *optional*): tokens over which the weight of a position falls to 1/e.
    """

    divergence: str = "forward_kl"
    temperature: float = 1.0
    label_smoothing: float = 0.0
    position_decay: float | None = None


def weigh_positions(
    batch: dict[str, torch.Tensor],
    blocks: DraftBlocks,
    position_decay: float | None = None,
    decay_over: int | None = None,
) -> torch.Tensor:
    """
    Find the positions of the consistency loss and their weights.

    Args:
        batch (`dict[str, torch.Tensor]`): from `TrajectoryCollator`.
        blocks (`DraftBlocks`): the states that are trained on.
        position_decay (`float`, *optional*): see `position_weights`.
        decay_over (`int`, *optional*): tokens after which the weight begins anew, for windows of several blocks; by
            default a whole block.

    Returns:
        `torch.Tensor` of shape `(batch_size, num_blocks, block_size)`, float32: 0 where the context holds no wrong
        draft token (or, with successors, none that changes) and behind the end of the response.
    """
    block_size = blocks.states.shape[-1]
    targets = blocks.successors
    if targets is None:
        response = cut_responses(batch["clean_ids"], batch["prompt_lengths"], int(batch["response_lengths"].max()))
        targets = tokens_at(response, blocks.offsets, block_size)
    places = blocks.offsets[..., None] + torch.arange(block_size, device=blocks.offsets.device)
    in_response = places < batch["response_lengths"][:, None, None]
    is_trained = wrong_context(blocks.states, targets) & in_response & blocks.mask[..., None]
    parts = is_trained.split(decay_over or block_size, dim=-1)
    return torch.cat([position_weights(part, position_decay) for part in parts], dim=-1)


def count_positions(batch: dict[str, torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    """
    Count what the two losses are means over.

    Args:
        batch (`dict[str, torch.Tensor]`): from `TrajectoryCollator`.
        weights (`torch.Tensor` of shape `(batch_size, num_blocks, block_size)`): from `weigh_positions`.

    Returns:
        `torch.Tensor` of shape `(2,)`, float32: sum of the consistency weights, number of positions of the AR loss.
    """
    labels = batch.get("label_ids", batch["labels"])
    return torch.stack([weights.sum(), (labels != -100).sum().float()])


def sum_losses(
    model: torch.nn.Module,
    base_model: PreTrainedModel,
    batch: dict[str, Any],
    objective: Objective,
) -> torch.Tensor:
    """
    Run the packed forward and sum both losses.

    The logits of the clean sequence are the targets of all states (with successors: those of the successors) and give
    the AR loss on the response. Ground-truth answers, if the batch has them, are one more branch behind the prompt.
    No other logits are computed than those that a loss is on.

    Args:
        model (`torch.nn.Module`): the model, possibly wrapped.
        base_model (`transformers.PreTrainedModel`): the model in the wrappers.
        batch (`dict`): from `BatchPreparer.prepare`.
        objective (`Objective`): what to sum.

    Returns:
        `torch.Tensor` of shape `(2,)`: consistency loss and AR loss, summed over their positions.
    """
    blocks, weights = batch["draft_blocks"], batch["consistency_weights"]
    packed = _pack(batch, blocks)
    rows, length = packed.input_ids.shape
    row_starts = torch.arange(rows, device=packed.input_ids.device) * length

    # Every prediction of a token of the response: the clean column before it.
    row, column = (batch["labels"] != -100).nonzero(as_tuple=True)
    clean_places = row_starts[row] + column - 1
    row, block, position = weights.nonzero(as_tuple=True)
    state_places = row_starts[row] + packed.columns(0)[block, position]
    groups = [clean_places, state_places]
    if blocks.successors is not None:
        groups.append(row_starts[row] + packed.columns(1)[block, position])
    ar_tokens = batch["labels"][batch["labels"] != -100]
    if "label_ids" in batch:
        label_row, label_position = (batch["label_ids"] != -100).nonzero(as_tuple=True)
        ar_tokens = batch["label_ids"][label_row, label_position]
        groups.append(row_starts[label_row] + packed.columns(-1)[0, label_position])
    filled, new_places = fill_rows(packed)
    logits = packed_forward(model, filled, base_model, new_places[torch.cat(groups)])
    logits = logits.split([len(group) for group in groups])

    if blocks.successors is None:
        # Row by row, the response's predictions lie one after the other.
        first = batch["response_lengths"].cumsum(0) - batch["response_lengths"]
        targets, places = logits[0], first[row] + blocks.offsets[row, block] + position
    else:
        targets, places = logits[2], torch.arange(len(state_places), device=row.device)
    consistency = _sum_divergence(logits[1], targets.detach(), places, weights[row, block, position], objective)
    ar_logits = logits[-1] if "label_ids" in batch else logits[0]
    ar = ar_cross_entropy(ar_logits, ar_tokens, objective.label_smoothing).sum()
    return torch.stack([consistency, ar])


def _pack(batch: dict[str, torch.Tensor], blocks: DraftBlocks) -> PackedBatch:
    before = batch["prompt_lengths"][:, None] - 1
    anchors = blocks.offsets + before
    last_positions = batch["prompt_lengths"] + batch["response_lengths"] - 1
    groups = [Drafts(blocks.states, anchors, blocks.mask, last_positions)]
    if blocks.successors is not None:
        groups.append(Drafts(blocks.successors, anchors, blocks.mask, last_positions))
    if "label_ids" in batch:
        groups.append(Drafts(batch["label_ids"].clamp(min=0)[:, None], before, torch.ones_like(before)))
    return pack(batch["clean_ids"], batch["clean_mask"], *groups)


def _sum_divergence(
    logits: torch.Tensor,
    targets: torch.Tensor,
    places: torch.Tensor,
    weights: torch.Tensor,
    objective: Objective,
) -> torch.Tensor:
    """Weighted sum over positions, a part at a time; the target of position `i` is `targets[places[i]]`."""
    divergence = DIVERGENCES[objective.divergence]

    def sum_part(logits: torch.Tensor, places: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return (divergence(logits, targets[places], objective.temperature) * weights).sum()

    if len(places) <= _POSITIONS_AT_ONCE:
        return sum_part(logits, places, weights)
    parts = zip(*(values.split(_POSITIONS_AT_ONCE) for values in (logits, places, weights)))
    # Probabilities are computed again in the backward pass instead of being kept for all positions.
    return torch.stack([checkpoint(sum_part, *part, use_reentrant=False) for part in parts]).sum()
