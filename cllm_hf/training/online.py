"""
States made while training, by the model as it is: what its own decoding would hold at a random moment.

The sliding window of Jacobi decoding is run along each response for a few iterations, many windows at once, in packed
forward passes without gradient. No stored states are needed, and they never go stale.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from ..blocks.forward import forward_clean, forward_drafts
from ..blocks.layout import Drafts, pack
from ..blocks.rules import count_accepted_in_blocks, next_drafts
from .batch import TrainingBatch
from .states import DraftBlocks


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
    Run sliding windows from random places of each response.

    Every iteration is one forward pass over all windows. As in decoding, the draft tokens up to the first wrong one
    and the token that replaces it are committed, the window slides past them, and the model's other predictions lead
    the next draft. What is right is what the response says, so that the committed text stays the response. A window
    that has come to the end begins again at the start.

    Args:
        model (`torch.nn.Module`): the model that is trained, possibly wrapped.
        base_model (`transformers.PreTrainedModel`): the model in the wrappers.
        batch (`TrainingBatch`): prompts and responses.
        draws (`torch.Tensor` of shape `(batch_size, num_windows, 1 + block_size)`): random numbers in `[0, 1)`: where
            each window begins, and which tokens of the prompt fill it.
        block_size (`int`): tokens of a window.
        num_iterations (`int`): how often all windows iterate; 0 leaves them as they are filled.
        with_successors (`bool`): whether the next states are wanted too, which takes one more forward pass.

    Returns:
        `DraftBlocks` with `num_windows` blocks.
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
            predicted = forward_drafts(model, packed, cache, base_model).argmax(-1).view_as(states)
            # The last token of a state is not fed, so nothing checks it.
            num_committed = 1 + count_accepted_in_blocks(states[..., :-1], right)
            if iteration < num_iterations:
                states, offsets = _slide(predicted, fillers, offsets, num_committed, lengths)
                right = _tokens_at(batch.response_ids, offsets, block_size)
            else:
                is_committed = torch.arange(block_size, device=states.device) < num_committed[..., None]
                successors = torch.where(is_committed, right, predicted)
    finally:
        model.train(was_training)
    return DraftBlocks(states, right, offsets, mask, successors)


def _slide(
    predicted: torch.Tensor,
    fillers: torch.Tensor,
    offsets: torch.Tensor,
    num_committed: torch.Tensor,
    lengths: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """States and offsets of the windows past what they have committed, or at the start again after the response."""
    offsets = offsets + num_committed
    at_end = offsets >= lengths
    states = torch.where(at_end[..., None], fillers, next_drafts(predicted, num_committed, fillers))
    return states, offsets.masked_fill(at_end, 0)


def _tokens_at(responses: torch.Tensor, offsets: torch.Tensor, block_size: int) -> torch.Tensor:
    """
    The responses' tokens in windows that begin inside them, and 0 after the end: `[B, num_windows, block_size]`.

    Tokens after the response are wrong whatever they are, and no loss is on them.
    """
    places = offsets[..., None] + torch.arange(block_size, device=offsets.device)
    padded = torch.nn.functional.pad(responses, (0, block_size))
    return padded.gather(1, places.flatten(1)).view_as(places)
