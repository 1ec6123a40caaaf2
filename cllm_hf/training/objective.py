"""The loss of a batch: one packed forward pass, and sums of both losses over their positions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ..blocks.forward import packed_forward
from ..blocks.layout import Drafts, PackedBatch, fill_rows, pack
from .batch import PreparedBatch, TrainingBatch
from .losses import DIVERGENCES, ar_cross_entropy
from .states import DraftBlocks, position_weights, wrong_context


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


class LossTotals:
    """Sums of both losses and numbers of their positions, batch by batch since they were last taken."""

    def __init__(self) -> None:
        self._sums: list[torch.Tensor] = []
        self._counts: list[torch.Tensor] = []

    def add(self, sums: torch.Tensor, counts: torch.Tensor) -> None:
        """
        Add a batch.

        Args:
            sums (`torch.Tensor` of shape `(2,)`): from `sum_losses`.
            counts (`torch.Tensor` of shape `(2,)`): from `count_positions`.
        """
        self._sums.append(sums.detach())
        self._counts.append(counts)

    def take(self, accelerator: Accelerator) -> tuple[list[float], list[float]] | None:
        """
        Take the totals of all processes, and begin anew.

        Args:
            accelerator (`accelerate.Accelerator`): of the run; each of its processes calls this.

        Returns:
            `tuple[list[float], list[float]]`: the mean of each loss and the number of its positions, or `None` where
            no batch was added.
        """
        if not self._sums:
            return None
        totals = torch.stack([torch.stack(self._sums).sum(0), torch.stack(self._counts).sum(0)])
        self._sums, self._counts = [], []
        sums, counts = accelerator.reduce(totals.double(), reduction="sum").tolist()
        return [total / (count or 1) for total, count in zip(sums, counts)], counts


def weigh_positions(
    batch: TrainingBatch,
    blocks: DraftBlocks,
    position_decay: float | None = None,
    decay_over: int | None = None,
) -> torch.Tensor:
    """
    Find the positions of the consistency loss and their weights.

    Args:
        batch (`TrainingBatch`): the records.
        blocks (`DraftBlocks`): the states that are trained on.
        position_decay (`float`, *optional*): see `position_weights`.
        decay_over (`int`, *optional*): tokens after which the weight begins anew, for windows of several blocks; by
            default a whole block.

    Returns:
        `torch.Tensor` of shape `(batch_size, num_blocks, block_size)`, float32: 0 where the context holds no wrong
        draft token (or, with successors, none that changes) and after the end of the response.
    """
    block_size = blocks.states.shape[-1]
    targets = blocks.fixed_points if blocks.successors is None else blocks.successors
    places = blocks.offsets[..., None] + torch.arange(block_size, device=blocks.offsets.device)
    in_response = places < batch.response_lengths[:, None, None]
    is_trained = wrong_context(blocks.states, targets) & in_response & blocks.mask[..., None]
    parts = is_trained.split(decay_over or block_size, dim=-1)
    return torch.cat([position_weights(part, position_decay) for part in parts], dim=-1)


def count_positions(batch: TrainingBatch, weights: torch.Tensor) -> torch.Tensor:
    """
    Count what the two losses are means over.

    Args:
        batch (`TrainingBatch`): the records.
        weights (`torch.Tensor` of shape `(batch_size, num_blocks, block_size)`): from `weigh_positions`.

    Returns:
        `torch.Tensor` of shape `(2,)`, float32: sum of the consistency weights, number of positions of the AR loss.
    """
    return torch.stack([weights.sum(), batch.ar_lengths.sum().float()])


def sum_losses(
    model: torch.nn.Module,
    base_model: PreTrainedModel,
    prepared: PreparedBatch,
    objective: Objective,
) -> torch.Tensor:
    """
    Run the packed forward pass and sum both losses.

    The logits of the responses in the clean sequences are the targets of all states (with successors: those of the
    successors) and give the AR loss. Ground-truth answers, if the batch has them, are one more branch after the
    prompt, and the AR loss is on them instead. No other logits are computed than those that a loss is on.

    Args:
        model (`torch.nn.Module`): the model, possibly wrapped.
        base_model (`transformers.PreTrainedModel`): the model in the wrappers.
        prepared (`PreparedBatch`): from `BatchPreparer.prepare`.
        objective (`Objective`): what to sum.

    Returns:
        `torch.Tensor` of shape `(2,)`: consistency loss and AR loss, summed over their positions.
    """
    batch, blocks, weights = prepared.batch, prepared.blocks, prepared.weights
    trained = row, block, position = weights.nonzero(as_tuple=True)
    logits = _logits_by_name(model, base_model, *_lay_out(batch, blocks, trained))
    if blocks.successors is None:
        # The rows' responses lie one after the other.
        first = batch.response_lengths.cumsum(0) - batch.response_lengths
        targets, places = logits["response"], first[row] + blocks.offsets[row, block] + position
    else:
        targets, places = logits["successors"], torch.arange(len(row), device=row.device)
    consistency = sum_divergence(logits["states"], targets.detach(), places, weights[row, block, position], objective)
    name, ids = ("response", batch.response_ids) if batch.label_ids is None else ("labels", batch.label_ids)
    tokens = ids[_is_token(ids, batch.ar_lengths)]
    ar = ar_cross_entropy(logits[name], tokens, objective.label_smoothing).sum()
    return torch.stack([consistency, ar])


def _lay_out(
    batch: TrainingBatch, blocks: DraftBlocks, trained: tuple[torch.Tensor, ...]
) -> tuple[PackedBatch, dict[str, torch.Tensor]]:
    """
    Pack a batch, and find by name the places, `row * packed_length + column`, whose logits are wanted.

    `"response"` are those of all tokens of the responses and `"labels"` those of the ground-truth answers, row by row;
    `"states"` and `"successors"` those of the trained positions: their rows, blocks and positions in the block.
    """
    anchors = batch.anchors(blocks.offsets)
    drafts = {"states": Drafts(blocks.states, anchors, blocks.mask, batch.last_positions)}
    if blocks.successors is not None:
        drafts["successors"] = Drafts(blocks.successors, anchors, blocks.mask, batch.last_positions)
    if batch.label_ids is not None:
        last_of_prompt = batch.prompt_lengths[:, None] - 1
        drafts["labels"] = Drafts(batch.label_ids[:, None], last_of_prompt, torch.ones_like(last_of_prompt))
    packed = pack(batch.clean_ids, batch.clean_mask, *drafts.values())
    columns = {name: packed.columns(number) for number, name in enumerate(drafts)}
    rows, length = packed.input_ids.shape
    starts = torch.arange(rows, device=packed.input_ids.device) * length

    # A token's prediction stands one column before it.
    row, position = _is_token(batch.response_ids, batch.response_lengths).nonzero(as_tuple=True)
    places = {"response": starts[row] + batch.prompt_lengths[row] - 1 + position}
    row, block, position = trained
    places["states"] = starts[row] + columns["states"][block, position]
    if blocks.successors is not None:
        places["successors"] = starts[row] + columns["successors"][block, position]
    if batch.label_ids is not None:
        row, position = _is_token(batch.label_ids, batch.ar_lengths).nonzero(as_tuple=True)
        places["labels"] = starts[row] + columns["labels"][0, position]
    return packed, places


def _logits_by_name(
    model: torch.nn.Module, base_model: PreTrainedModel, packed: PackedBatch, places: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Run one packed forward pass; the logits at each group of places, `[num_places, vocab_size]`, under its name."""
    filled, new_places = fill_rows(packed)
    logits = packed_forward(model, filled, base_model, new_places[torch.cat(list(places.values()))])
    return dict(zip(places, logits.split([len(group) for group in places.values()])))


def _is_token(ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Where padded rows hold tokens, `[batch_size, padded_length]`."""
    return torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]


def sum_divergence(
    logits: torch.Tensor,
    targets: torch.Tensor,
    places: torch.Tensor,
    weights: torch.Tensor,
    objective: Objective,
) -> torch.Tensor:
    """
    Sum a divergence over positions, a part at a time.

    Args:
        logits (`torch.Tensor` of shape `(num_positions, vocab_size)`): the model's.
        targets (`torch.Tensor` of shape `(num_targets, vocab_size)`): the target's, without gradient.
        places (`torch.LongTensor` of shape `(num_positions,)`): which target each position has.
        weights (`torch.Tensor` of shape `(num_positions,)`): of the positions.
        objective (`Objective`): which divergence.

    Returns:
        `torch.Tensor` of shape `()`: the weighted sum.
    """
    divergence = DIVERGENCES[objective.divergence]

    def sum_part(logits: torch.Tensor, places: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return (divergence(logits, targets[places], objective.temperature) * weights).sum()

    if len(places) <= _POSITIONS_AT_ONCE:
        return sum_part(logits, places, weights)
    parts = zip(*(values.split(_POSITIONS_AT_ONCE) for values in (logits, places, weights)))
    # Probabilities are computed again in the backward pass instead of being kept for all positions.
    return torch.stack([checkpoint(sum_part, *part, use_reentrant=False) for part in parts]).sum()
