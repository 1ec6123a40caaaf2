"""
Which states are trained on: pure functions from the candidates of each block to the draft blocks of an optimizer step.

All randomness is a number that the caller draws for each record. The choice for a record thus depends neither on the
batch nor on the process that it is in, and a resumed run makes the same one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..blocks.rules import count_accepted_in_blocks


@dataclass
class DraftBlocks:
    """
    The draft blocks of a batch.

    Attributes:
        states (`torch.LongTensor` of shape `(batch_size, num_blocks, block_size)`): the draft states.
        fixed_points (`torch.LongTensor` of shape `(batch_size, num_blocks, block_size)`): the response's tokens at the
            same places, 0 after its end.
        offsets (`torch.LongTensor` of shape `(batch_size, num_blocks)`): place in the response of each block's first
            token.
        mask (`torch.BoolTensor` of shape `(batch_size, num_blocks)`): whether there is a block.
        successors (`torch.LongTensor` of shape `(batch_size, num_blocks, block_size)`, *optional*): the next state of
            each, for the local consistency loss.
    """

    states: torch.Tensor
    fixed_points: torch.Tensor
    offsets: torch.Tensor
    mask: torch.Tensor
    successors: torch.Tensor | None = None


def choose_uniformly(num_candidates: torch.Tensor, draws: torch.Tensor, states_per_block: int) -> torch.Tensor:
    """
    Choose states of each block, all equally often, and different ones as far as there are that many.

    Args:
        num_candidates (`torch.LongTensor` of shape `(batch_size, num_blocks)`): states to choose from.
        draws (`torch.Tensor` of shape `(batch_size, num_blocks)`): random numbers in `[0, 1)`.
        states_per_block (`int`): how many to choose.

    Returns:
        `torch.LongTensor` of shape `(batch_size, states_per_block, num_blocks)`: which of them.
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

    Args:
        candidates (`torch.Tensor` of shape `(batch_size, num_blocks, num_states, block_size)`): states in order.
        num_candidates (`torch.LongTensor` of shape `(batch_size, num_blocks)`): how many of them may be chosen.
        fixed_points (`torch.LongTensor` of shape `(batch_size, num_blocks, block_size)`): where they end.
        states_per_block (`int`): how many to choose.
        window (`int`): blocks of a cycle.

    Returns:
        `torch.LongTensor` of shape `(batch_size, states_per_block, num_blocks)`: which of them.
    """
    num_blocks, num_states = candidates.shape[1:3]
    device = candidates.device
    num_right = count_accepted_in_blocks(candidates, fixed_points[:, :, None])
    noise = 1 - num_right / candidates.shape[-1]
    schedule = torch.linspace(0, 1, window, device=device) if window > 1 else torch.ones(1, device=device)
    shifts = torch.arange(states_per_block, device=device)[:, None] * window // states_per_block
    wanted = schedule[(torch.arange(num_blocks, device=device) + shifts) % window]
    distance = (noise[:, None] - wanted[None, :, :, None]).abs()
    beyond = torch.arange(num_states, device=device) >= num_candidates[..., None].clamp(min=1)
    return distance.masked_fill(beyond[:, None], 2.0).argmin(-1)


def take_states(candidates: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """
    Take the chosen states, as drafts of the whole response.

    Args:
        candidates (`torch.Tensor` of shape `(batch_size, num_blocks, num_states, block_size)`): states.
        chosen (`torch.LongTensor` of shape `(batch_size, states_per_block, num_blocks)`): which of them.

    Returns:
        `torch.LongTensor` of shape `(batch_size, states_per_block, num_blocks * block_size)`.
    """
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
    Cut drafts of whole responses into blocks of any size.

    A block's context is the clean response before it and its own draft. Larger blocks than the trajectories have thus
    see the drafts of the smaller ones that they are made of.

    Args:
        drafts (`torch.LongTensor` of shape `(batch_size, states_per_block, draft_length)`): drafts.
        responses (`torch.LongTensor` of shape `(batch_size, response_length)`): what they are drafts of, padded with
            0; no longer than the drafts.
        response_lengths (`torch.LongTensor` of shape `(batch_size,)`): tokens of the responses.
        block_size (`int`): tokens of a block, or more than the drafts have for one block of all.
        successors (`torch.LongTensor` of the shape of `drafts`, *optional*): the next states.

    Returns:
        `DraftBlocks` with `states_per_block * ceil(draft_length / block_size)` blocks.
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
    Mark the positions whose context holds a draft token that is not the target's.

    At the first such token itself the context is still the same, and so is the model's distribution.

    Args:
        states (`torch.LongTensor` of shape `(..., block_size)`): states of blocks.
        targets (`torch.LongTensor` of shape `(..., block_size)`): their fixed points, or their next states.

    Returns:
        `torch.BoolTensor` of shape `(..., block_size)`.
    """
    num_wrong = (states != targets).long().cumsum(-1)
    return torch.nn.functional.pad(num_wrong[..., :-1], (1, 0)) > 0


def position_weights(is_trained: torch.Tensor, decay: float | None) -> torch.Tensor:
    """
    Weights of the positions of each block: 1 at the first that is trained, and `exp(-i / decay)` at the `i`-th after.

    Decoding accepts tokens from the front, so that what comes late in a block pays only if all before it is right.

    Args:
        is_trained (`torch.BoolTensor` of shape `(..., block_size)`): from `wrong_context`, cut to the response.
        decay (`float`, *optional*): tokens over which the weight falls to 1/e; by default it does not fall.

    Returns:
        `torch.Tensor` of shape `(..., block_size)`, float32, 0 where nothing is trained.
    """
    weights = is_trained.float()
    if decay is not None:
        place = (is_trained.long().cumsum(-1) - 1).clamp(min=0)
        weights = weights * torch.exp(-place / decay)
    return weights
