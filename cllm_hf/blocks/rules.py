"""
Pure functions over blocks: first draft, accepted tokens, next draft, cut at a stop token.

Words (one forward over a block of size `n`): the input is `[anchor, draft_0 .. draft_{n-2}]`, the prediction at input
position `i` checks `draft_i`, and the prediction behind the last accepted draft token is the bonus token.
"""

from __future__ import annotations

from collections.abc import Collection

import torch


def draw_context_tokens(
    context_ids: torch.Tensor, context_mask: torch.Tensor, num_tokens: int, generator: torch.Generator
) -> torch.Tensor:
    """
    Draw tokens at random, with replacement, from each row's own context (CLLM, arXiv 2403.00835, section 3.1).

    Args:
        context_ids (`torch.LongTensor` of shape `(batch_size, context_length)`): tokens to draw from.
        context_mask (`torch.Tensor` of shape `(batch_size, context_length)`): non-zero where a token may be drawn.
        num_tokens (`int`): how many tokens to draw for each row.
        generator (`torch.Generator`): source of randomness, on the CPU, so that a draw does not depend on the device.

    Returns:
        `torch.LongTensor` of shape `(batch_size, num_tokens)`.

    Raises:
        ValueError: if a row of `context_mask` allows no token at all.
    """
    weights = context_mask.to("cpu", torch.float32).clamp(min=0)
    if (weights.sum(-1) == 0).any():
        raise ValueError("Every row of `context_mask` must allow at least one token to draw, got a row of zeros.")
    if num_tokens == 0:
        return context_ids.new_empty((context_ids.shape[0], 0))
    picked = torch.multinomial(weights, num_tokens, replacement=True, generator=generator)
    return context_ids.gather(1, picked.to(context_ids.device))


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
    Slide the window: the predictions behind the committed tokens lead the next draft, fresh tokens fill its end.

    Args:
        rest (`list[int]`): what the model predicted behind the committed tokens.
        filler (`list[int]`): tokens for positions with no prediction, as many as the draft shall have.

    Returns:
        `list[int]`: as long as `filler`; `rest[i]` where it exists, elsewhere `filler[i - len(rest)]`.
    """
    return (rest + filler)[: len(filler)]
