"""
The rules of Jacobi decoding, once each: accepted tokens, cut at a stop token, slide of the window, near ties.

Words (one forward pass over a block of size `n`): the input is `[anchor, draft_0 .. draft_{n-2}]`, the prediction at
input position `i` checks `draft_i`, and the prediction after the last accepted draft token is the bonus token.

Decoding walks lists, since rows of a batch accept different numbers of tokens and a device is slow at that; training
and collecting handle many blocks at once, as tensors. Both forms stand side by side and are tested against each other.

Two forward passes of other shapes add the same numbers up in another order and round other sums, so that in 16 bits
each of them may find another of two close tokens the best. Neither is more right than the other. Whatever judges given
tokens by a forward pass (collecting, verifying, measuring) asks `judge_greedy`; decoding, whose own forward pass
chooses, does not.
"""

from __future__ import annotations

import math
from collections.abc import Collection

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


def count_accepted(draft: list[int], predicted: list[int]) -> int:
    """Count the leading draft tokens that the model confirms; `predicted` is one token longer than the draft."""
    if len(predicted) != len(draft) + 1:
        raise ValueError(
            "`predicted` must be exactly one token longer than `draft`, got lengths "
            f"{len(predicted)} and {len(draft)}."
        )
    return next((place for place, token in enumerate(draft) if token != predicted[place]), len(draft))


def confirmed_by(
    token_ids: list[int], parents: list[int], is_drafter: list[bool] | None = None
) -> dict[tuple[int, int], int]:
    """
    For a place of a tree and the model's token after it, the place of the guess that is accepted; of `token_ids` the
    anchor stands first, and nothing is accepted where `is_drafter`.
    """
    places = enumerate(zip(parents, token_ids))
    return {key: place for place, key in places if is_drafter is None or not is_drafter[place]}


def accepted_path(
    token_ids: list[int], parents: list[int], predicted: list[int], is_drafter: list[bool] | None = None
) -> list[int]:
    """
    Follow a tree of guesses as far as the model confirms them: places of the anchor and of the accepted tokens. The
    prediction at the last is the bonus token. Of a chain, `count_accepted` counts the same.
    """
    confirmed = confirmed_by(token_ids, parents, is_drafter)
    path = [0]
    while (child := confirmed.get((path[-1], predicted[path[-1]]))) is not None:
        path.append(child)
    return path


def count_accepted_in_blocks(drafts: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
    """`count_accepted` for tensors: `[..., draft_length]` and at least as many predictions give `[...]`."""
    length = drafts.shape[-1]
    if predicted.shape[-1] < length:
        raise ValueError(
            f"`predicted` must be at least as long as `drafts`, got shapes {tuple(predicted.shape)} and "
            f"{tuple(drafts.shape)}."
        )
    return count_leading(drafts == predicted[..., :length])


def count_leading(is_right: torch.Tensor) -> torch.Tensor:
    """Count the tokens before the first wrong one, in many blocks at once: `[..., length]` gives `[...]`."""
    return is_right.long().cumprod(-1).sum(-1)


def count_until_stop(tokens: list[int], stop_ids: Collection[int]) -> int:
    """Count the tokens up to and including the first stop token; one more than there are where none occurs."""
    return next((place for place, token in enumerate(tokens, start=1) if token in stop_ids), len(tokens) + 1)


def next_draft(rest: list[int], filler: list[int]) -> list[int]:
    """Slide the window: the predictions after the committed tokens lead the next draft, fresh tokens fill its end."""
    return (rest + filler)[: len(filler)]


def next_drafts(predicted: torch.Tensor, num_committed: torch.Tensor, fillers: torch.Tensor) -> torch.Tensor:
    """`next_draft` for tensors: `[..., predicted_length]`, `[...]` and `[..., draft_length]`, as is the result."""
    places = num_committed[..., None] + torch.arange(fillers.shape[-1], device=predicted.device)
    return torch.cat([predicted, fillers], dim=-1).gather(-1, places)


def judge_greedy(
    logits: torch.Tensor, token_ids: torch.Tensor, dtype: torch.dtype, asked: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Judge given tokens by the logits of a forward pass over them, `[..., vocab_size]` and `[...]`.

    Returns the best token of each place, and where the given one is another that counts as greedy too, as its logit
    lies within `near_tie_bound` of the best one. A near tie is only looked for in places that are `asked`.
    """
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
    """How far the logits of given tokens lie below the best ones: `[...]`."""
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
