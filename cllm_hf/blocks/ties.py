"""
Which tokens count as greedy: the best one, and at a near tie those that rounding alone keeps from being the best.

Two forward passes of other shapes add the same numbers up in another order and round other sums, so that in 16 bits
each of them may find another of two close tokens the best. Neither is more right than the other. Whatever judges given
tokens by a forward pass (collecting, verifying, measuring) asks here; decoding, whose own forward pass chooses, does
not.
"""

from __future__ import annotations

import math

import torch


# In epsilons of the dtype: the distance of 1 from the next number. The gap of two logits in two forward passes is made
# of four rounded logits, each off by half an epsilon of its size at most: 2 in all. The hidden states before them were
# rounded in every layer, which moves a gap as a random walk does: by half an epsilon at 30 layers, doubled here.
_ROUNDINGS = 3.0
# Products are added up in float32 whatever the dtype, or in the dtype where that is finer. In float32 this is what
# counts, as measured; in 16 bits it is nothing.
_SUMS = 9.0
# Rows that are looked at in float32 at once.
_ROWS_AT_ONCE = 128


def judge_greedy(
    logits: torch.Tensor, token_ids: torch.Tensor, dtype: torch.dtype, asked: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Judge given tokens by the logits of a forward pass over them."""
    best_ids = logits.argmax(-1)
    differs = best_ids != token_ids
    if asked is not None:
        differs &= asked
    near_ties = torch.zeros_like(differs)
    for places in differs.nonzero().split(_ROWS_AT_ONCE):
        place = places.unbind(-1)
        rows = logits[place]
        near_ties[place] = gap_to_best(rows, token_ids[place]) <= near_tie_bound(rows, dtype)
    return best_ids, near_ties


def gap_to_best(logits: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Measure how far the logits of given tokens lie below the best ones."""
    return _exact(logits.amax(-1)) - _exact(logits.gather(-1, token_ids[..., None])[..., 0])


def near_tie_bound(logits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """
    Bound what rounding does to the gap between the best logit and one close to it.

    The bound is a few epsilons of the dtype times the size of the logits. That is the size of the best one, or where
    that is small, as after training with a z-loss, how far it stands above the mean: an error of the hidden state
    moves logits by a part of their spread. More than `log(vocab_size)`, by which a logit must stand out to be likely
    at all, is not taken for spread, so that masked logits do not widen the bound.
    """
    epsilon = max(torch.finfo(dtype).eps, torch.finfo(logits.dtype).eps)
    scores = _exact(logits)
    best = scores.amax(-1)
    spread = (best - scores.mean(-1)).clamp(max=math.log(logits.shape[-1]))
    parts = _ROUNDINGS * epsilon + _SUMS * min(epsilon, torch.finfo(torch.float32).eps)
    return parts * torch.maximum(best.abs(), spread)


def _exact(logits: torch.Tensor) -> torch.Tensor:
    """In a dtype in which differences of logits are not rounded again."""
    return logits.float() if logits.element_size() < 4 else logits.double()
