"""The Jacobi trajectories of given responses: all blocks of a batch of responses iterate together, packed."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from ..packing import PackedBatch, cache_clean, forward_blocks, pack
from .schema import num_blocks


def draw_first_states(
    prompt_ids: list[int], response_length: int, block_size: int, pad_id: int, seed: tuple[int, int]
) -> np.ndarray:
    """
    Draw the first draft of every block at random from the prompt's tokens (CLLM, arXiv 2403.00835, section 3.1).

    Args:
        prompt_ids (`list[int]`): tokens to draw from, with replacement.
        response_length (`int`): tokens of the response.
        block_size (`int`): tokens of a block.
        pad_id (`int`): stands behind the end of the response.
        seed (`tuple[int, int]`): seed of the run and number of the prompt, so that a draw does not depend on batches.

    Returns:
        `numpy.ndarray` of shape `(num_blocks, block_size)`.
    """
    blocks = num_blocks(response_length, block_size)
    drawn = np.random.default_rng(seed).choice(np.asarray(prompt_ids, dtype=np.int64), blocks * block_size)
    drawn[response_length:] = pad_id
    return drawn.reshape(blocks, block_size)


@torch.no_grad()
def collect_states(
    model: PreTrainedModel,
    prompts: list[list[int]],
    responses: list[list[int]],
    first_states: list[np.ndarray],
    pad_id: int,
) -> list[list[list[list[int]]]]:
    """
    Iterate all blocks of a batch of responses until every one has reached its fixed point.

    The context of a block is the response itself, so that the blocks of a response converge independently, each in at
    most `block_size` iterations: an iteration makes at least one more leading token right.

    Args:
        model (`transformers.PreTrainedModel`): the target model, in evaluation mode.
        prompts (`list[list[int]]`): token ids of each prompt.
        responses (`list[list[int]]`): token ids of each response.
        first_states (`list[numpy.ndarray]`): for each response its first drafts, of shape `(num_blocks, block_size)`.
        pad_id (`int`): stands behind the end of a response.

    Returns:
        `list[list[list[list[int]]]]`: for each response, each of its blocks, the states from the first draft to the
        fixed point.
    """
    trajectories = [[[block.tolist()] for block in blocks] for blocks in first_states]
    packed, states, in_response = _lay_out(prompts, responses, first_states, pad_id, model.device)
    cache = cache_clean(model, packed)
    rows = torch.arange(len(prompts), device=model.device)
    for _ in range(states.shape[-1] + 1):  # the last iteration only confirms
        predicted = forward_blocks(model, packed.with_states(states), cache).argmax(-1)
        new_states = torch.where(in_response, predicted, pad_id)
        changed = (new_states != states).any(-1)
        for row, new_blocks, is_new in zip(rows.tolist(), new_states.tolist(), changed.tolist()):
            for trajectory, state, new in zip(trajectories[row], new_blocks, is_new):
                if new:
                    trajectory.append(state)
        left = changed.any(-1)
        rows, states, in_response = rows[left], new_states[left], in_response[left]
        if not left.any():
            break
        if not left.all():
            packed = packed.select(left)
            cache.batch_select_indices(left)
    return trajectories


def _lay_out(
    prompts: list[list[int]],
    responses: list[list[int]],
    first_states: list[np.ndarray],
    pad_id: int,
    device: torch.device,
) -> tuple[PackedBatch, torch.Tensor, torch.Tensor]:
    """The packed batch, its first states, and which of their positions lie in a response."""
    block_size = first_states[0].shape[1]
    sequences = [torch.tensor(prompt + response) for prompt, response in zip(prompts, responses)]
    clean_ids = pad_sequence(sequences, batch_first=True)
    clean_mask = pad_sequence([torch.ones_like(sequence) for sequence in sequences], batch_first=True)
    states = pad_sequence(
        [torch.from_numpy(blocks) for blocks in first_states], batch_first=True, padding_value=pad_id
    )
    offsets = torch.arange(states[0].numel()).view_as(states[0])
    in_response = offsets < torch.tensor([len(response) for response in responses])[:, None, None]
    anchors = torch.tensor([len(prompt) - 1 for prompt in prompts])[:, None] + block_size * torch.arange(
        states.shape[1]
    )
    tensors = (clean_ids, clean_mask, states, anchors, in_response.any(-1))
    return pack(*(tensor.to(device) for tensor in tensors)), states.to(device), in_response.to(device)
