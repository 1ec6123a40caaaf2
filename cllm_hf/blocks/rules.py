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
    """
    Count the leading draft tokens that the model confirms.

    Args:
        draft (`list[int]`): guess that was fed after the anchor.
        predicted (`list[int]`): the model's token at each position; the token at `i` checks `draft[i]`.

    Returns:
        `int`: between 0 and the length of the draft.

    Raises:
        ValueError: if the two lengths do not differ by exactly one.
    """
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
    Find which guess of a tree a prediction confirms.

    Args:
        token_ids (`list[int]`): the anchor, then the guesses.
        parents (`list[int]`): for each place, the place of the token before it; -1 for the anchor. Siblings differ.
        is_drafter (`list[bool]`, *optional*): places at which nothing is accepted.

    Returns:
        `dict[tuple[int, int], int]`: for a place and the model's token after it, the place of the guess that is
        accepted.
    """
    places = enumerate(zip(parents, token_ids))
    return {key: place for place, key in places if is_drafter is None or not is_drafter[place]}


def accepted_path(
    token_ids: list[int], parents: list[int], predicted: list[int], is_drafter: list[bool] | None = None
) -> list[int]:
    """
    Follow a tree of guesses as far as the model confirms them; of a chain, `count_accepted` counts the same.

    Args:
        token_ids (`list[int]`): the anchor, then the guesses.
        parents (`list[int]`): for each place, the place of the token before it; -1 for the anchor. Siblings differ.
        predicted (`list[int]`): the model's token after each place.
        is_drafter (`list[bool]`, *optional*): places at which nothing is accepted.

    Returns:
        `list[int]`: places of the anchor and of the accepted tokens. The prediction at the last is the bonus token.
    """
    confirmed = confirmed_by(token_ids, parents, is_drafter)
    path = [0]
    while (child := confirmed.get((path[-1], predicted[path[-1]]))) is not None:
        path.append(child)
    return path


def count_accepted_in_blocks(drafts: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
    """
    Count the leading draft tokens that the model confirms, in many blocks at once: `count_accepted` for tensors.

    Args:
        drafts (`torch.LongTensor` of shape `(..., draft_length)`): guesses, each fed after its anchor.
        predicted (`torch.LongTensor` of shape `(..., predicted_length)`): the model's token at each position; those
            beyond `draft_length` check nothing.

    Returns:
        `torch.LongTensor` of shape `(...)`: between 0 and `draft_length`.

    Raises:
        ValueError: if there are fewer predictions than draft tokens.
    """
    length = drafts.shape[-1]
    if predicted.shape[-1] < length:
        raise ValueError(
            f"`predicted` must be at least as long as `drafts`, got shapes {tuple(predicted.shape)} and "
            f"{tuple(drafts.shape)}."
        )
    return count_leading(drafts == predicted[..., :length])


def count_leading(is_right: torch.Tensor) -> torch.Tensor:
    """
    Count the tokens before the first wrong one, in many blocks at once.

    Args:
        is_right (`torch.BoolTensor` of shape `(..., length)`): which tokens are right.

    Returns:
        `torch.LongTensor` of shape `(...)`: between 0 and `length`.
    """
    return is_right.long().cumprod(-1).sum(-1)


def count_until_stop(tokens: list[int], stop_ids: Collection[int]) -> int:
    """
    Count the tokens up to and including the first stop token.

    Args:
        tokens (`list[int]`): tokens to search.
        stop_ids (`Collection[int]`): tokens that end a sequence.

    Returns:
        `int`: 1 to the number of tokens, or one more where no stop token occurs.
    """
    return next((place for place, token in enumerate(tokens, start=1) if token in stop_ids), len(tokens) + 1)


def next_draft(rest: list[int], filler: list[int]) -> list[int]:
    """
    Slide the window: the predictions after the committed tokens lead the next draft, fresh tokens fill its end.

    Args:
        rest (`list[int]`): what the model predicted after the committed tokens.
        filler (`list[int]`): tokens for positions with no prediction, as many as the draft shall have.

    Returns:
        `list[int]`: as long as `filler`; `rest[i]` where it exists, elsewhere `filler[i - len(rest)]`.
    """
    return (rest + filler)[: len(filler)]


def next_drafts(predicted: torch.Tensor, num_committed: torch.Tensor, fillers: torch.Tensor) -> torch.Tensor:
    """
    Slide many windows at once: `next_draft` for tensors.

    Args:
        predicted (`torch.LongTensor` of shape `(..., predicted_length)`): the model's token at each position.
        num_committed (`torch.LongTensor` of shape `(...)`): how many of them were committed, up to `predicted_length`.
        fillers (`torch.LongTensor` of shape `(..., draft_length)`): tokens for positions with no prediction.

    Returns:
        `torch.LongTensor` of the shape of `fillers`.
    """
    places = num_committed[..., None] + torch.arange(fillers.shape[-1], device=predicted.device)
    return torch.cat([predicted, fillers], dim=-1).gather(-1, places)
