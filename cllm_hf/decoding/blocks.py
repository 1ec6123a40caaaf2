"""
Pure tensor functions over blocks: first draft, accepted tokens, next draft, cut at a stop token.

Words (one forward over a block of size `n`): the input is `[anchor, draft_0 .. draft_{n-2}]`, the prediction at input
position `i` checks `draft_i`, and the prediction behind the last accepted draft token is the bonus token.
"""

from __future__ import annotations

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


def count_accepted(draft_ids: torch.Tensor, predicted_ids: torch.Tensor) -> torch.Tensor:
    """
    Count the leading draft tokens that the model confirms.

    Args:
        draft_ids (`torch.LongTensor` of shape `(batch_size, draft_length)`): guess that was fed after the anchor.
        predicted_ids (`torch.LongTensor` of shape `(batch_size, draft_length + 1)`): the model's token at each
            position; the token at `i` checks `draft_ids[:, i]`.

    Returns:
        `torch.LongTensor` of shape `(batch_size,)`: between 0 and `draft_length`.

    Raises:
        ValueError: if the two lengths do not differ by exactly one.
    """
    if predicted_ids.shape[1] != draft_ids.shape[1] + 1:
        raise ValueError(
            "`predicted_ids` must be exactly one token longer than `draft_ids`, got lengths "
            f"{predicted_ids.shape[1]} and {draft_ids.shape[1]}."
        )
    return (draft_ids == predicted_ids[:, :-1]).long().cumprod(-1).sum(-1)


def count_until_stop(token_ids: torch.Tensor, stop_ids: torch.Tensor) -> torch.Tensor:
    """
    Count the tokens up to and including the first stop token.

    Args:
        token_ids (`torch.LongTensor` of shape `(batch_size, length)`): tokens to search.
        stop_ids (`torch.LongTensor` of shape `(num_stop_ids,)`): tokens that end a sequence.

    Returns:
        `torch.LongTensor` of shape `(batch_size,)`: 1 to `length`, or `length + 1` where no stop token occurs.
    """
    before_stop = ~torch.isin(token_ids, stop_ids)
    return before_stop.long().cumprod(-1).sum(-1) + 1


def next_draft(predicted_ids: torch.Tensor, num_committed: torch.Tensor, filler_ids: torch.Tensor) -> torch.Tensor:
    """
    Slide the window: the predictions behind the committed tokens lead the next draft, fresh tokens fill its end.

    Args:
        predicted_ids (`torch.LongTensor` of shape `(batch_size, length)`): the model's tokens of this iteration.
        num_committed (`torch.LongTensor` of shape `(batch_size,)`): how many of them were committed, at least 1.
        filler_ids (`torch.LongTensor` of shape `(batch_size, draft_length)`): tokens for positions with no prediction.

    Returns:
        `torch.LongTensor` of shape `(batch_size, draft_length)`: `predicted_ids[num_committed + i]` where it exists,
        `filler_ids[i]` elsewhere.
    """
    draft_length, length = filler_ids.shape[1], predicted_ids.shape[1]
    source = torch.arange(draft_length, device=predicted_ids.device) + num_committed[:, None]
    shifted = predicted_ids.gather(1, source.clamp(max=length - 1))
    return torch.where(source < length, shifted, filler_ids)
