"""The published way to collect trajectories (CLLM, arXiv 2403.00835, section 3.1), as a baseline of measurements."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import torch

from cllm_hf.blocks.layout import num_blocks
from cllm_hf.blocks.rules import count_until_stop


@torch.no_grad()
def collect_one_by_one(
    model: Any,
    prompt_ids: list[int],
    first_states: np.ndarray,
    max_new_tokens: int,
    stop_ids: Collection[int],
    pad_id: int,
) -> tuple[list[int], list[list[list[int]]]]:
    """
    Decode a response to one prompt by Jacobi iteration, one block after the other, and record the states.

    Written from the description, for any causal language model. An iteration is one forward pass over prompt, earlier
    blocks and the block's state, without a cache, and the argmax at all places of the block. A block ends when two
    states in a row are equal, and the next one continues from its fixed point. The forward pass is the model's plain
    one, which computes the logits of all positions, also those that nobody looks at.

    Args:
        model (`transformers.PreTrainedModel`): the target model, in evaluation mode.
        prompt_ids (`list[int]`): token ids of the prompt.
        first_states (`numpy.ndarray` of shape `(num_blocks, block_size)`): first drafts of the blocks of a response
            of `max_new_tokens` tokens; those after its end are not looked at.
        max_new_tokens (`int`): longest response, in tokens; the last block is cut there.
        stop_ids (`Collection[int]`): tokens that end a response.
        pad_id (`int`): stands after the end of the response.

    Returns:
        `tuple[list[int], list[list[list[int]]]]`: token ids of the response, and for each of its blocks the states
        from the first draft to the fixed point, as in a record of `cllm_hf.TrajectoryBuilder`.

    Raises:
        ValueError: if `first_states` are of fewer blocks than `max_new_tokens` take.
    """
    block_size = first_states.shape[1]
    if len(first_states) < num_blocks(max_new_tokens, block_size):
        raise ValueError(
            f"`first_states` must hold a draft of each of {num_blocks(max_new_tokens, block_size)} blocks, got "
            f"{len(first_states)}. Draw them for `max_new_tokens={max_new_tokens}`."
        )
    stops = set(stop_ids)
    response: list[int] = []
    states = []
    for first_state in first_states.tolist():
        first_state = first_state[: max_new_tokens - len(response)]
        trajectory = _iterate(model, prompt_ids + response, first_state)
        fixed_point = trajectory[-1][: count_until_stop(trajectory[-1], stops)]
        states.append(_in_response(trajectory, len(fixed_point), block_size, pad_id))
        response += fixed_point
        if fixed_point[-1] in stops or len(response) >= max_new_tokens:
            break
    return response, states


def _iterate(model: Any, context: list[int], first_state: list[int]) -> list[list[int]]:
    """The states of one block, from the first draft to the fixed point."""
    start, width = len(context), len(first_state)
    input_ids = torch.tensor([context + first_state], device=model.device)
    states = [input_ids[0, start:].clone()]
    # An iteration makes at least one more leading token right, and the last one only confirms. Where the hardware
    # does not repeat itself exactly the bound keeps two near ties from taking turns for ever.
    for _ in range(width + 1):
        predicted = model(input_ids, use_cache=False).logits[0, start - 1 : -1].argmax(-1)
        if torch.equal(predicted, states[-1]):
            break
        states.append(predicted)
        input_ids[0, start:] = predicted
    return torch.stack(states).tolist()


def _in_response(trajectory: list[list[int]], length: int, block_size: int, pad_id: int) -> list[list[int]]:
    """The states with padding after the end of the response; some then are the one before once more."""
    padded = [state[:length] + [pad_id] * (block_size - length) for state in trajectory]
    return padded[:1] + [state for before, state in zip(padded, padded[1:]) if state != before]
