"""Whether `CLLMTrainer` and the published step compute the same losses, without which times say nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from accelerate.utils import send_to_device

from cllm_hf.training.trainer import CLLMTrainer

from .published_training import StateExample, draw_example, published_losses, trainable_blocks
from .training_methods import Record


# Largest difference of a loss, in float32, over the loss or 1.
_TOLERANCE = 1e-4


def draw_examples(records: Sequence[Record], seed: int, count: int = 3) -> list[tuple[Record, StateExample]]:
    """
    Draw a state of a random block of the first few records.

    Args:
        records (`Sequence[dict]`): trajectory records.
        seed (`int`): of the draw.
        count (`int`): how many records.

    Returns:
        `list[tuple[dict, StateExample]]`: with a consistency loss, where a few draws find such a state.
    """
    torch.manual_seed(seed)
    pairs = []
    for record in records[:count]:
        draws = [draw_example(record) for _ in range(2 * len(trainable_blocks(record)))]
        pairs.append((record, max(draws, key=lambda example: example.num_loss_positions > 0)))
    return pairs


def compare_losses(trainer: CLLMTrainer, examples: Sequence[tuple[Record, StateExample]]) -> dict[str, float]:
    """
    Check that trainer and published step have the same losses, in float32 and without dropout.

    Args:
        trainer (`cllm_hf.CLLMTrainer`): the trainer.
        examples (`Sequence[tuple[dict, StateExample]]`): records and a state of each.

    Returns:
        `dict[str, float]`: the largest difference of each loss, over the loss or 1.

    Raises:
        ValueError: if one is above 1e-4.
    """
    model, largest = trainer.model, {"consistency_loss": 0.0, "ar_loss": 0.0}
    model.eval()
    with _in_float32(model):
        for record, example in examples:
            batch = send_to_device(trainer.data_collator([_only_state(record, example)]), model.device)
            with torch.no_grad():
                ours = trainer.compute_loss(model, batch, return_outputs=True)[1]
            for name, theirs in zip(largest, published_losses(model, example)):
                difference = abs(float(ours[name]) - theirs) / max(abs(theirs), 1.0)
                if not difference <= _TOLERANCE:  # nor for what is not a number
                    raise ValueError(
                        f"Both steps must have the same losses, got `{name}` {float(ours[name]):.6f} from "
                        f"`CLLMTrainer` and {theirs:.6f} from the published step, for block {example.block} of record "
                        f"{record.get('data_id', '?')}. What they cost cannot be compared."
                    )
                largest[name] = max(difference, largest[name])
    return largest


def _only_state(record: Record, example: StateExample) -> Record:
    """The record with one state of one block before the fixed points, so that there is nothing else to draw."""
    states = [[block[-1]] for block in record["states"]]
    fixed_point = states[example.block][0]
    states[example.block] = [example.state + list(fixed_point[len(example.state) :]), fixed_point]
    return {**record, "states": states, "augmented_states": None}


@contextmanager
def _in_float32(model: torch.nn.Module) -> Iterator[None]:
    """The weights in float32 for a while; they come back exactly, since float32 has room for all of bfloat16."""
    tensors = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()]
    dtypes = [tensor.dtype for tensor in tensors]
    for tensor in tensors:
        tensor.data = tensor.data.float()
    try:
        yield
    finally:
        for tensor, dtype in zip(tensors, dtypes):
            tensor.data = tensor.data.to(dtype)
