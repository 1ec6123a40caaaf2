"""
The rules of Jacobi decoding, once each: first draft, accepted tokens, cut at a stop token, slide of the window.

Words (one forward pass over a block of size `n`): the input is `[anchor, draft_0 .. draft_{n-2}]`, the prediction at
input position `i` checks `draft_i`, and the prediction after the last accepted draft token is the bonus token.

Decoding walks lists, since rows of a batch accept different numbers of tokens and a device is slow at that; training
and collecting handle many blocks at once, as tensors. Both forms stand side by side and are tested against each other.
"""

from __future__ import annotations

from collections.abc import Collection

import torch


def count_accepted(draft: list[int], predicted: list[int]) -> int:
    """Count the leading draft tokens that the model confirms."""
    if len(predicted) != len(draft) + 1:
        raise ValueError(
            "`predicted` must be exactly one token longer than `draft`, got lengths "
            f"{len(predicted)} and {len(draft)}."
        )
    return next((place for place, token in enumerate(draft) if token != predicted[place]), len(draft))


def confirmed_by(
    token_ids: list[int], parents: list[int], is_drafter: list[bool] | None = None
) -> dict[tuple[int, int], int]:
    """Find which guess of a tree a prediction confirms."""
    places = enumerate(zip(parents, token_ids))
    return {key: place for place, key in places if is_drafter is None or not is_drafter[place]}


def accepted_path(
    token_ids: list[int], parents: list[int], predicted: list[int], is_drafter: list[bool] | None = None
) -> list[int]:
    """Follow a tree of guesses as far as the model confirms them; of a chain, `count_accepted` counts the same."""
    confirmed = confirmed_by(token_ids, parents, is_drafter)
    path = [0]
    while (child := confirmed.get((path[-1], predicted[path[-1]]))) is not None:
        path.append(child)
    return path


def count_accepted_in_blocks(drafts: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
    """Count the leading draft tokens that the model confirms, in many blocks at once: `count_accepted` for tensors."""
    length = drafts.shape[-1]
    if predicted.shape[-1] < length:
        raise ValueError(
            f"`predicted` must be at least as long as `drafts`, got shapes {tuple(predicted.shape)} and "
            f"{tuple(drafts.shape)}."
        )
    return count_leading(drafts == predicted[..., :length])


def count_leading(is_right: torch.Tensor) -> torch.Tensor:
    """Count the tokens before the first wrong one, in many blocks at once."""
    return is_right.long().cumprod(-1).sum(-1)


def count_until_stop(tokens: list[int], stop_ids: Collection[int]) -> int:
    """Count the tokens up to and including the first stop token."""
    return next((place for place, token in enumerate(tokens, start=1) if token in stop_ids), len(tokens) + 1)


def next_draft(rest: list[int], filler: list[int]) -> list[int]:
    """Slide the window: the predictions after the committed tokens lead the next draft, fresh tokens fill its end."""
    return (rest + filler)[: len(filler)]


def next_drafts(predicted: torch.Tensor, num_committed: torch.Tensor, fillers: torch.Tensor) -> torch.Tensor:
    """Slide many windows at once: `next_draft` for tensors."""
    places = num_committed[..., None] + torch.arange(fillers.shape[-1], device=predicted.device)
    return torch.cat([predicted, fillers], dim=-1).gather(-1, places)
