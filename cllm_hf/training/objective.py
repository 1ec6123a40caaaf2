"""
The objective of consistency training: which states an optimizer step trains on, and the sums of both losses.

One packed forward pass gives the clean sequence of every response and the chosen states of its blocks; `losses` has
the formulas at each position.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ..blocks.forward import packed_forward
from ..blocks.layout import Drafts, PackedBatch, fill_rows, pack
from .batch import TrainingBatch
from .config import CLLMConfig
from .losses import DIVERGENCES, ar_cross_entropy
from .states import (
    DraftBlocks,
    choose_progressively,
    choose_uniformly,
    cut_blocks,
    make_online_states,
    position_weights,
    take_states,
    wrong_context,
)


# Positions whose probabilities are held at once: those of a vocabulary of 150,000 take 0.6 GiB in float32. A CPU gets
# tensors of that size from the system each time anew, which takes as long as computing them.
_POSITIONS_AT_ONCE, _POSITIONS_AT_ONCE_ON_CPU = 1024, 128


@dataclass
class PreparedBatch:
    """What of a batch an optimizer step trains on."""

    batch: TrainingBatch
    blocks: DraftBlocks  # the states that were chosen or made
    weights: torch.Tensor  # [B, num_blocks, block_size], of the positions in the consistency loss
    counts: torch.Tensor  # [2], what the losses are means over


class Objective:
    """What objectives share: the block size of a moment of a run, and random numbers for each record."""

    def __init__(self, config: CLLMConfig, block_size: int):
        self.config = config
        self.block_sizes = config.block_size_schedule or [block_size]

    def size_at(self, progress: float) -> int:
        """The block size when a share of the run is done, which goes through the sizes in equal parts."""
        return self.block_sizes[min(int(progress * len(self.block_sizes)), len(self.block_sizes) - 1)]

    def draw_numbers(self, batch: TrainingBatch, update: int | None, shape: tuple[int, ...]) -> torch.Tensor:
        """
        Draw random numbers in [0, 1) for each record, `[B, *shape]`: the same ones for the same seed, optimizer step
        and record; a longer shape only has more.
        """
        numbers = np.stack([self.generator(update, key).random(shape) for key in batch.record_keys.tolist()])
        # As float32 the largest number would round to 1.
        return torch.from_numpy(numbers).clamp(max=1 - 2**-24).float().to(batch.clean_ids.device)

    def generator(self, update: int | None, *key: int) -> np.random.Generator:
        """Of the random numbers of an optimizer step, or of a record in it; `None` is an evaluation."""
        seed = self.config.seed if self.config.data_seed is None else self.config.data_seed
        return np.random.default_rng([seed, 0 if update is None else update + 1, *key])


class ConsistencyObjective(Objective):
    """
    Chooses or makes the states of every batch, and sums its losses: `consistency_loss + ar_loss_weight * ar_loss`,
    each a mean over its own positions.

    A choice follows from the seed, the number of the optimizer step and the record alone. Models come in their
    wrappers and without.
    """

    loss_names: ClassVar[tuple[str, str]] = ("consistency_loss", "ar_loss")

    @property
    def second_weight(self) -> float:
        """Of the AR loss."""
        return self.config.ar_loss_weight

    def prepare(
        self,
        model: torch.nn.Module,
        base_model: PreTrainedModel,
        batch: TrainingBatch,
        update: int | None,
        progress: float,
    ) -> PreparedBatch:
        """
        Choose or make the states of a batch.

        `update` is the number of the optimizer step, from 0 on, or `None` in evaluation, which has a choice of its
        own; `progress` is the share of the training that is done, from 0 to 1.
        """
        config = self.config
        own_size = self.size_at(progress)
        # In noisy context, blocks see each other's drafts: a window is one large block.
        block_size = own_size * (config.noise_window if config.context == "noisy" else 1)
        if config.trajectory_source == "online":
            blocks = self._make_states(model, base_model, batch, update, block_size)
        else:
            blocks = self._choose_states(batch, update, block_size)
        weights = weigh_positions(batch, blocks, config.position_decay, own_size)
        return PreparedBatch(batch, blocks, weights, torch.stack([weights.sum(), batch.ar_lengths.sum().float()]))

    def sum_losses(self, model: torch.nn.Module, base_model: PreTrainedModel, prepared: PreparedBatch) -> torch.Tensor:
        """
        Run the packed forward pass and sum both losses.

        The logits of the responses in the clean sequences are the targets of all states (with successors: those of the
        successors) and give the AR loss. Ground-truth answers, if the batch has them, are one more branch after the
        prompt, and the AR loss is on them instead. No other logits are computed than those that a loss is on.

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
        chosen = weights[row, block, position]
        consistency = sum_divergence(logits["states"], targets.detach(), places, chosen, self.config)
        name, ids = ("response", batch.response_ids) if batch.label_ids is None else ("labels", batch.label_ids)
        tokens = ids[_is_token(ids, batch.ar_lengths)]
        smoothing = self.config.ar_label_smoothing
        ar = _sum_in_parts(lambda part, ids: ar_cross_entropy(part, ids, smoothing).sum(), logits[name], tokens)
        return torch.stack([consistency, ar])

    def _choose_states(self, batch: TrainingBatch, update: int | None, block_size: int) -> DraftBlocks:
        if batch.candidates is None or batch.num_candidates is None:
            raise ValueError("A batch must hold states to choose from, got none. Collate it with `with_states=True`.")
        config, candidates, num_candidates = self.config, batch.candidates, batch.num_candidates
        if config.state_sampling == "progressive":
            chosen = choose_progressively(
                candidates, num_candidates, candidates[:, :, -1], config.states_per_block, config.noise_window
            )
        else:
            draws = self.draw_numbers(batch, update, candidates.shape[1:2])
            chosen = choose_uniformly(num_candidates, draws, config.states_per_block)
        drafts, successors = take_states(candidates, chosen), None
        if config.consistency == "local":  # after the last state comes the fixed point
            successors = take_states(candidates, (chosen + 1).clamp(max=candidates.shape[2] - 1))
        return cut_blocks(drafts, batch.response_ids, batch.response_lengths, block_size, successors)

    def _make_states(
        self,
        model: torch.nn.Module,
        base_model: PreTrainedModel,
        batch: TrainingBatch,
        update: int | None,
        block_size: int,
    ) -> DraftBlocks:
        config = self.config
        num_windows = config.states_per_block * -(-batch.response_lengths // block_size)
        draws = self.draw_numbers(batch, update, (int(num_windows.max()), 1 + block_size))
        # A window reaches no further than the longest response; its tokens in a response are the same.
        block_size = min(block_size, int(batch.response_lengths.max()))
        num_iterations = config.online_iterations
        if update is not None:
            num_iterations = int(self.generator(update).integers(config.online_iterations + 1))
        draws, is_local = draws[..., : 1 + block_size], config.consistency == "local"
        blocks = make_online_states(model, base_model, batch, draws, block_size, num_iterations, is_local)
        blocks.mask &= torch.arange(draws.shape[1], device=draws.device) < num_windows[:, None]
        return blocks


def weigh_positions(
    batch: TrainingBatch, blocks: DraftBlocks, position_decay: float | None, decay_over: int
) -> torch.Tensor:
    """
    Weights of the positions in the consistency loss, `[B, num_blocks, block_size]`: 0 where the context holds no wrong
    draft token (or, with successors, none that changes) and after the end of the response.

    The weights begin anew after `decay_over` tokens, for windows of several blocks.
    """
    block_size = blocks.states.shape[-1]
    targets = blocks.fixed_points if blocks.successors is None else blocks.successors
    places = blocks.offsets[..., None] + torch.arange(block_size, device=blocks.offsets.device)
    in_response = places < batch.response_lengths[:, None, None]
    is_trained = wrong_context(blocks.states, targets) & in_response & blocks.mask[..., None]
    parts = is_trained.split(decay_over, dim=-1)
    return torch.cat([position_weights(part, position_decay) for part in parts], dim=-1)


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
    config: CLLMConfig,
) -> torch.Tensor:
    """
    The weighted sum of a divergence over positions, a part at a time.

    Args:
        logits (`torch.Tensor` of shape `(num_positions, vocab_size)`): the model's.
        targets (`torch.Tensor` of shape `(num_targets, vocab_size)`): the target's, without gradient.
        places (`torch.LongTensor` of shape `(num_positions,)`): which target each position has.
        weights (`torch.Tensor` of shape `(num_positions,)`): of the positions.
        config (`CLLMConfig`): which divergence, and its temperature.
    """
    divergence = DIVERGENCES[config.divergence]

    def sum_part(logits: torch.Tensor, places: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return (divergence(logits, targets[places], config.divergence_temperature) * weights).sum()

    return _sum_in_parts(sum_part, logits, places, weights)


def _sum_in_parts(compute: Callable[..., torch.Tensor], *values: torch.Tensor) -> torch.Tensor:
    """A sum over positions, some at a time: probabilities are computed again in the backward pass, and not kept."""
    most = _POSITIONS_AT_ONCE_ON_CPU if values[0].device.type == "cpu" else _POSITIONS_AT_ONCE
    if len(values[0]) <= most:
        return compute(*values)
    parts = zip(*(one.split(most) for one in values))
    return torch.stack([checkpoint(compute, *part, use_reentrant=False) for part in parts]).sum()


class LossTotals:
    """Sums of both losses and numbers of their positions, batch by batch since they were last taken."""

    def __init__(self) -> None:
        self._batches: list[torch.Tensor] = []

    def add(self, sums: torch.Tensor, counts: torch.Tensor) -> None:
        """Add a batch, both `[2]`."""
        self._batches.append(torch.stack([sums.detach(), counts]))

    def take(self, accelerator: Accelerator) -> tuple[list[float], list[float]] | None:
        """
        Take the means and the numbers of positions over all processes, each of which calls this, and begin anew;
        `None` where no batch was added.
        """
        if not self._batches:
            return None
        totals, self._batches = torch.stack(self._batches).sum(0), []
        sums, counts = accelerator.reduce(totals.double(), reduction="sum").tolist()
        return [total / (count or 1) for total, count in zip(sums, counts)], counts
