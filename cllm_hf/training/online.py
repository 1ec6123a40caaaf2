"""
States made while training, by the model as it is: what its own decoding would hold at a random moment.

The sliding window of Jacobi decoding is run along each response for a few iterations, many windows at once, in packed
forwards without gradient. No stored states are needed, and they never go stale.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from ..blocks.forward import forward_clean, forward_drafts
from ..blocks.layout import Drafts, pack
from .states import DraftBlocks, cut_responses, tokens_at


@torch.no_grad()
def make_online_states(
    model: torch.nn.Module,
    base_model: PreTrainedModel,
    batch: dict[str, torch.Tensor],
    draws: torch.Tensor,
    block_size: int,
    num_iterations: int,
    with_successors: bool = False,
) -> DraftBlocks:
    """
    Run sliding windows from random places of each response.

    Every iteration is one forward over all windows. As in decoding, the draft tokens up to the first wrong one and the
    token that replaces it are committed, the window slides behind them, and the model's other predictions lead the
    next draft. What is right is what the response says, so that the committed text stays the response. A window that
    has come to the end begins again at the start.

    Args:
        model (`torch.nn.Module`): the model that is trained, possibly wrapped.
        base_model (`transformers.PreTrainedModel`): the model in the wrappers.
        batch (`dict[str, torch.Tensor]`): from `TrajectoryCollator`.
        draws (`torch.Tensor` of shape `(batch_size, num_windows, 1 + block_size)`): random numbers in `[0, 1)`: where
            each window begins, and which tokens of the prompt fill it.
        block_size (`int`): tokens of a window.
        num_iterations (`int`): how often all windows iterate; 0 leaves them as they are filled.
        with_successors (`bool`): whether the next states are wanted too, which takes one more forward.

    Returns:
        `DraftBlocks` with `num_windows` blocks.
    """
    lengths, prompt_lengths = batch["response_lengths"][:, None], batch["prompt_lengths"][:, None]
    longest, last_positions = int(lengths.max()), (lengths + prompt_lengths - 1)[:, 0]
    # Tokens behind the response are wrong whatever they are, and no loss is on them.
    response = cut_responses(batch["clean_ids"], prompt_lengths[:, 0], longest + block_size)
    offsets = (draws[..., 0] * lengths).long()
    from_prompt = (draws[..., 1:] * prompt_lengths[..., None]).long()
    fillers = batch["clean_ids"][:, None].expand(-1, draws.shape[1], -1).gather(2, from_prompt)
    states, mask, successors = fillers, torch.ones_like(offsets, dtype=torch.bool), None
    if num_iterations == 0 and not with_successors:
        return DraftBlocks(states, offsets, mask)
    was_training = model.training
    model.eval()  # with gradient checkpointing, models in training mode take no cache
    try:
        _, cache = forward_clean(model, batch["clean_ids"], batch["clean_mask"], 1, base_model)
        for iteration in range(num_iterations + with_successors):
            drafts = Drafts(states, offsets + prompt_lengths - 1, mask, last_positions)
            packed = pack(batch["clean_ids"], batch["clean_mask"], drafts)
            predicted = forward_drafts(model, packed, cache, base_model).argmax(-1).view_as(states)
            right = tokens_at(response, offsets, block_size)
            # The last token of a state is not fed, so nothing checks it.
            num_committed = 1 + (states == right)[..., :-1].long().cumprod(-1).sum(-1)
            if iteration < num_iterations:
                states, offsets = _slide(predicted, fillers, offsets, num_committed, lengths)
            else:
                is_committed = torch.arange(block_size, device=states.device) < num_committed[..., None]
                successors = torch.where(is_committed, right, predicted)
    finally:
        model.train(was_training)
    return DraftBlocks(states, offsets, mask, successors)


def _slide(
    predicted: torch.Tensor,
    fillers: torch.Tensor,
    offsets: torch.Tensor,
    num_committed: torch.Tensor,
    lengths: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Slide the windows behind what they have committed, as `next_draft` of decoding does; states and offsets."""
    block_size = predicted.shape[-1]
    rest = num_committed[..., None] + torch.arange(block_size, device=predicted.device)
    # What was predicted behind the committed tokens, then the filler from its beginning.
    slid = torch.cat([predicted, fillers], dim=-1).gather(2, rest)
    offsets = offsets + num_committed
    at_end = offsets >= lengths
    return torch.where(at_end[..., None], fillers, slid), offsets.masked_fill(at_end, 0)
