"""
Which states an optimizer step trains on: chosen from the stored ones, or made by the model as it is.

All randomness is a number that the caller draws for each record. The choice for a record thus depends neither on the
batch nor on the process that it is in, and a resumed run makes the same one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ..blocks.forward import forward_clean, packed_forward
from ..blocks.layout import Drafts, pack
from ..blocks.rules import count_accepted_in_blocks, next_drafts
from .batch import TrainingBatch


@dataclass
class DraftBlocks:
    """The draft blocks of a batch."""

    states: torch.Tensor  # [B, num_blocks, block_size]
    fixed_points: torch.Tensor  # [B, num_blocks, block_size], the response's tokens there, 0 after its end
    offsets: torch.Tensor  # [B, num_blocks], place in the response of each block's first token
    mask: torch.Tensor  # [B, num_blocks], whether there is a block
    successors: torch.Tensor | None = None  # [B, num_blocks, block_size], next states, for the local consistency loss


def choose_uniformly(num_candidates: torch.Tensor, draws: torch.Tensor, states_per_block: int) -> torch.Tensor:
    """
    Choose states of each block, all equally often, and different ones as far as there are that many.

    From `num_candidates` and `draws` in `[0, 1)`, both `[B, num_blocks]`, to indices `[B, states_per_block,
    num_blocks]`.
    """
    # A random first one, and from there on equal steps around the circle of all: whole numbers, so that no rounding
    # makes two of them the same.
    counts = num_candidates.clamp(min=1)
    first = torch.minimum((draws * counts).long(), counts - 1)
    steps = torch.arange(states_per_block, device=draws.device)[None, :, None] * counts[:, None] // states_per_block
    return (first[:, None] + steps) % counts[:, None]


def choose_progressively(
    candidates: torch.Tensor,
    num_candidates: torch.Tensor,
    fixed_points: torch.Tensor,
    states_per_block: int,
    window: int,
) -> torch.Tensor:
    """
    Choose states by a cyclic noise schedule over the blocks (Jacobi Forcing, arXiv 2512.14681).

    The noise of a state is the share of the block from its first wrong token on. Within every `window` blocks the
    wanted noise rises evenly from 0 to 1, and each block gives the state whose noise is nearest. Further states of a
    block are taken from as many equal shifts of the schedule.

    From `candidates` `[B, num_blocks, num_states, block_size]` to indices `[B, states_per_block, num_blocks]`.
    """
    num_blocks, num_states = candidates.shape[1:3]
    device = candidates.device
    num_right = count_accepted_in_blocks(candidates, fixed_points[:, :, None])
    noise = 1 - num_right / candidates.shape[-1]  # [B, num_blocks, num_states]
    schedule = torch.linspace(0, 1, window, device=device) if window > 1 else torch.ones(1, device=device)
    shifts = torch.arange(states_per_block, device=device)[:, None] * window // states_per_block
    wanted = schedule[(torch.arange(num_blocks, device=device) + shifts) % window]  # [states_per_block, num_blocks]
    distance = (noise[:, None] - wanted[None, :, :, None]).abs()
    beyond = torch.arange(num_states, device=device) >= num_candidates[..., None].clamp(min=1)
    return distance.masked_fill(beyond[:, None], 2.0).argmin(-1)


def take_states(candidates: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """The chosen states, as drafts of the whole response: `[B, states_per_block, num_blocks * block_size]`."""
    rows = torch.arange(len(candidates), device=candidates.device)[:, None, None]
    blocks = torch.arange(candidates.shape[1], device=candidates.device)
    return candidates[rows, blocks, chosen].long().flatten(2)


def cut_blocks(
    drafts: torch.Tensor,
    responses: torch.Tensor,
    response_lengths: torch.Tensor,
    block_size: int,
    successors: torch.Tensor | None = None,
) -> DraftBlocks:
    """
    Cut drafts of whole responses, `[B, states_per_block, draft_length]`, into blocks of any size.

    A block's context is the clean response before it and its own draft. Larger blocks than the trajectories have thus
    see the drafts of the smaller ones that they are made of.
    """
    batch_size, states_per_block, length = drafts.shape
    block_size = min(block_size, length)  # what lies after every draft would only cost columns
    num_blocks = -(-length // block_size)

    def cut(values: torch.Tensor) -> torch.Tensor:  # [B, S, <= draft_length] -> [B, S * num_blocks, block_size]
        padded = torch.nn.functional.pad(values, (0, num_blocks * block_size - values.shape[-1]))
        return padded.reshape(batch_size, states_per_block * num_blocks, block_size)

    offsets = (torch.arange(num_blocks, device=drafts.device) * block_size).repeat(states_per_block)
    offsets = offsets.expand(batch_size, -1)
    return DraftBlocks(
        states=cut(drafts),
        fixed_points=cut(responses[:, None].expand(-1, states_per_block, -1)),
        offsets=offsets,
        mask=offsets < response_lengths[:, None],
        successors=None if successors is None else cut(successors),
    )


def wrong_context(states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """
    Mark the positions, `[..., block_size]`, whose context holds a draft token that is not the target's.

    At the first such token itself the context is still the same, and so is the model's distribution.
    """
    num_wrong = (states != targets).long().cumsum(-1)
    return torch.nn.functional.pad(num_wrong[..., :-1], (1, 0)) > 0


def position_weights(is_trained: torch.Tensor, decay: float | None) -> torch.Tensor:
    """
    Weights of the positions of each block, `[..., block_size]`: 1 at the first that is trained, `exp(-i / decay)` at
    the `i`-th after, and 0 where nothing is trained.

    Decoding accepts tokens from the front, so that what comes late in a block pays only if all before it is right.
    """
    weights = is_trained.float()
    if decay is not None:
        place = (is_trained.long().cumsum(-1) - 1).clamp(min=0)
        weights = weights * torch.exp(-place / decay)
    return weights


@torch.no_grad()
def make_online_states(
    model: torch.nn.Module,
    base_model: PreTrainedModel,
    batch: TrainingBatch,
    draws: torch.Tensor,
    block_size: int,
    num_iterations: int,
    with_successors: bool = False,
) -> DraftBlocks:
    """
    Make states that the model's own decoding would hold at a random moment, for data without states.

    Many sliding windows at once run along each response for some iterations, each of which is one packed forward pass.
    As in decoding, the draft tokens up to the first wrong one and the token that replaces it are committed, the window
    slides past them, and the model's other predictions lead the next draft. What is right is what the response says,
    so that the committed text stays the response. A window that has come to the end begins again at the start.

    `draws`, `[B, num_windows, 1 + block_size]` in `[0, 1)`, says where each window begins, and which tokens of the
    prompt fill it. Successors take one more forward pass.
    """
    lengths = batch.response_lengths[:, None]
    offsets = (draws[..., 0] * lengths).long()
    from_prompt = (draws[..., 1:] * batch.prompt_lengths[:, None, None]).long()
    fillers = batch.clean_ids[:, None].expand(-1, draws.shape[1], -1).gather(2, from_prompt)
    states, mask, successors = fillers, torch.ones_like(offsets, dtype=torch.bool), None
    right = _tokens_at(batch.response_ids, offsets, block_size)
    if num_iterations == 0 and not with_successors:
        return DraftBlocks(states, right, offsets, mask)
    was_training = model.training
    model.eval()  # with gradient checkpointing, models in training mode take no cache
    try:
        _, cache = forward_clean(model, batch.clean_ids, batch.clean_mask, 1, base_model)
        for iteration in range(num_iterations + with_successors):
            drafts = Drafts(states, batch.anchors(offsets), mask, batch.last_positions)
            packed = pack(batch.clean_ids, batch.clean_mask, drafts)
            predicted = packed_forward(model, packed, base_model, clean_cache=cache).argmax(-1).view_as(states)
            # The last token of a state is not fed, so nothing checks it.
            num_committed = 1 + count_accepted_in_blocks(states[..., :-1], right)
            if iteration < num_iterations:
                offsets = offsets + num_committed
                at_end = offsets >= lengths
                slid = next_drafts(predicted, num_committed, fillers)
                states, offsets = torch.where(at_end[..., None], fillers, slid), offsets.masked_fill(at_end, 0)
                right = _tokens_at(batch.response_ids, offsets, block_size)
            else:
                is_committed = torch.arange(block_size, device=states.device) < num_committed[..., None]
                successors = torch.where(is_committed, right, predicted)
    finally:
        model.train(was_training)
    return DraftBlocks(states, right, offsets, mask, successors)


def _tokens_at(responses: torch.Tensor, offsets: torch.Tensor, block_size: int) -> torch.Tensor:
    """
    The responses' tokens in windows that begin inside them, and 0 after the end: `[B, num_windows, block_size]`.

    Tokens after the response are wrong whatever they are, and no loss is on them.
    """
    places = offsets[..., None] + torch.arange(block_size, device=offsets.device)
    padded = torch.nn.functional.pad(responses, (0, block_size))
    return padded.gather(1, places.flatten(1)).view_as(places)
