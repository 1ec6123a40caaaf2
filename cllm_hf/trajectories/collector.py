"""The Jacobi trajectories of given responses: all blocks of a batch of responses iterate together, packed."""

from __future__ import annotations

import numpy as np
import torch
from transformers import PreTrainedModel

from ..packing import pack, packed_forward
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
    left = list(range(len(prompts)))
    while left:
        new_states = _iterate(model, [prompts[i] + responses[i] for i in left], [len(prompts[i]) for i in left],
                              [[block[-1] for block in trajectories[i]] for i in left])  # fmt: skip
        unfinished = []
        for i, states in zip(left, new_states):
            changed = False
            for number, (trajectory, state) in enumerate(zip(trajectories[i], states)):
                length = min(len(state), len(responses[i]) - number * len(state))
                state[length:] = [pad_id] * (len(state) - length)
                if state != trajectory[-1]:
                    trajectory.append(state)
                    changed = True
            if changed:
                unfinished.append(i)
        left = unfinished
    return trajectories


def _iterate(
    model: PreTrainedModel, sequences: list[list[int]], prompt_lengths: list[int], states: list[list[list[int]]]
) -> list[list[list[int]]]:
    """One forward over the current states: the model's token at each of their positions."""
    batch_size, block_size = len(sequences), len(states[0][0])
    clean_length, most_blocks = max(map(len, sequences)), max(map(len, states))
    clean_ids = torch.zeros((batch_size, clean_length), dtype=torch.long)
    clean_mask = torch.zeros_like(clean_ids)
    state_ids = torch.zeros((batch_size, most_blocks, block_size), dtype=torch.long)
    block_mask = torch.zeros((batch_size, most_blocks), dtype=torch.long)
    for row, (sequence, blocks) in enumerate(zip(sequences, states)):
        clean_ids[row, : len(sequence)] = torch.tensor(sequence)
        clean_mask[row, : len(sequence)] = 1
        state_ids[row, : len(blocks)] = torch.tensor(blocks)
        block_mask[row, : len(blocks)] = 1
    anchors = torch.tensor(prompt_lengths)[:, None] - 1 + block_size * torch.arange(most_blocks)
    tensors = (clean_ids, clean_mask, state_ids, anchors.clamp(max=clean_length - 1), block_mask)
    packed = pack(*(tensor.to(model.device) for tensor in tensors))
    logits = packed_forward(model, packed, model.config, model.dtype)
    predicted = packed.split(logits)[1].argmax(-1).cpu()
    return [predicted[row, : len(blocks)].tolist() for row, blocks in enumerate(states)]
