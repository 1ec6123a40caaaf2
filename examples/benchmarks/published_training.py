"""The published training step (CLLM, arXiv 2403.00835, section 3.2, and its code), as a baseline of measurements."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class StateExample:
    """
    What the published procedure trains on in a step: one state of one block of a response.

    Attributes:
        prompt_ids (`list[int]`): token ids of the prompt.
        response_ids (`list[int]`): token ids of the whole response.
        block (`int`): number of the block.
        state (`list[int]`): a state of it, without what stands after the end of the response.
        start (`int`): position of the first token of the block in prompt and response.
    """

    prompt_ids: list[int]
    response_ids: list[int]
    block: int
    state: list[int]
    start: int

    @property
    def sequence_ids(self) -> list[int]:
        """`list[int]`: prompt and response."""
        return self.prompt_ids + self.response_ids

    @property
    def end(self) -> int:
        """`int`: position after the last token of the block."""
        return self.start + len(self.state)

    @property
    def first_wrong(self) -> int:
        """`int`: place in the block of the first token that is not that of the fixed point; its length if none is."""
        fixed_point = self.sequence_ids[self.start : self.end]
        places = (place for place, (ours, right) in enumerate(zip(self.state, fixed_point)) if ours != right)
        return next(places, len(self.state))

    @property
    def num_loss_positions(self) -> int:
        """`int`: positions after the first wrong token: at that one itself both distributions are still the same."""
        return max(len(self.state) - self.first_wrong - 1, 0)


def states_before(record: Mapping[str, Any], block: int) -> list[list[int]]:
    """
    The states of a block that a step may draw: those before the fixed point, and the augmented ones if there are any.

    Args:
        record (`Mapping[str, Any]`): a trajectory record.
        block (`int`): number of the block.

    Returns:
        `list[list[int]]`: none if the first draft was the fixed point already.
    """
    augmented = record.get("augmented_states")
    return [*(augmented[block] if augmented is not None else []), *record["states"][block][:-1]]


def trainable_blocks(record: Mapping[str, Any]) -> list[int]:
    """
    The blocks of a record that have a state before the fixed point.

    Args:
        record (`Mapping[str, Any]`): a trajectory record.

    Returns:
        `list[int]`: their numbers.
    """
    return [block for block in range(len(record["states"])) if states_before(record, block)]


def block_length(record: Mapping[str, Any], block: int) -> int:
    """
    Tokens of a block, without padding after the end of the response.

    Args:
        record (`Mapping[str, Any]`): a trajectory record.
        block (`int`): number of the block.

    Returns:
        `int`: between 1 and the block size.
    """
    block_size = len(record["states"][block][-1])
    return min(block_size, len(record["response_ids"]) - block * block_size)


def draw_example(record: Mapping[str, Any], block: int | None = None) -> StateExample:
    """
    Draw one block and one state of it, by torch's global generator.

    Args:
        record (`Mapping[str, Any]`): a trajectory record.
        block (`int`, *optional*): number of the block; by default a random one of `trainable_blocks`.

    Returns:
        `StateExample`.

    Raises:
        ValueError: if there is no state before the fixed point.
    """
    blocks = trainable_blocks(record) if block is None else [block]
    if not blocks or not states_before(record, blocks[0]):
        raise ValueError(
            f"Record {record.get('data_id', '?')} has no state before the fixed point to draw. Leave it out."
        )
    chosen = blocks[int(torch.randint(len(blocks), ()))]
    candidates = states_before(record, chosen)
    state = candidates[int(torch.randint(len(candidates), ()))]
    prompt = list(record["prompt_ids"])
    start = len(prompt) + chosen * len(state)
    return StateExample(
        prompt, list(record["response_ids"]), chosen, list(state[: block_length(record, chosen)]), start
    )


def published_step(
    model: Any, example: StateExample, ar_loss_weight: float, scale: float = 1.0, keeps_target_graph: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Three forward passes and two backwards over one state of one block; the gradients are added to those that are
    there.

    Written from the description, for any causal language model. The AR loss is the cross entropy of the response, in
    a forward pass over prompt and whole response, and has a backward of its own. The consistency loss is the soft
    cross entropy, the forward pass Kullback-Leibler divergence but for a constant,

        mean over positions from the first wrong token on of - sum_v p(v | fixed point) log q(v | state)

    with `p` from a second forward pass over prompt, earlier blocks and fixed point, which takes no gradient, and `q`
    from a third over the same with the state. The forward passes are the model's plain ones, which compute the logits
    of all positions. The losses look at no more logits than they need: the published code turns all of them to
    float32.

    Args:
        model (`transformers.PreTrainedModel`): the model, in training mode.
        example (`StateExample`): the state.
        ar_loss_weight (`float`): weight of the AR loss.
        scale (`float`): of both losses before their backwards, to accumulate gradients.
        keeps_target_graph (`bool`): whether the second forward pass builds a graph, which lives until the step is done
            and is never gone back through, as in the published code.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the consistency and the AR loss, without gradient, neither weighted nor
        scaled.
    """
    ar = published_ar_loss(model, example)
    targets = _target_logits(model, example) if keeps_target_graph else None
    (scale * ar_loss_weight * ar).backward()
    ar = ar.detach()
    if targets is None:
        with torch.no_grad():  # after the backward, when nothing else is held
            # A copy, since a part of them would hold the logits of all positions.
            targets = _target_logits(model, example).clone()
    cross_entropies = soft_cross_entropy(_state_logits(model, example), targets)
    # A state that differs from the fixed point after the end of the response only has nothing to learn from.
    consistency = cross_entropies.sum() / max(len(cross_entropies), 1)
    (scale * consistency).backward()
    return consistency.detach(), ar


@torch.no_grad()
def published_losses(model: Any, example: StateExample) -> tuple[float, float]:
    """
    The losses of a step in the terms of `cllm_hf.CLLMTrainer`: a divergence instead of a cross entropy.

    Args:
        model (`transformers.PreTrainedModel`): the model.
        example (`StateExample`): the state.

    Returns:
        `tuple[float, float]`: mean divergence over `example.num_loss_positions`, 0 if there are none, and AR loss.
    """
    targets = _target_logits(model, example)
    divergences = soft_cross_entropy(_state_logits(model, example), targets) - soft_cross_entropy(targets, targets)
    mean = divergences.sum().item() / max(example.num_loss_positions, 1)
    return mean, published_ar_loss(model, example).item()


def soft_cross_entropy(logits: torch.Tensor, target_logits: torch.Tensor) -> torch.Tensor:
    """
    Cross entropy of two distributions, `- sum_v p(v) log q(v)`.

    Args:
        logits (`torch.Tensor` of shape `(num_positions, vocab_size)`): of `q`.
        target_logits (`torch.Tensor` of shape `(num_positions, vocab_size)`): of `p`, which takes no gradient.

    Returns:
        `torch.Tensor` of shape `(num_positions,)`, float32, in nats.
    """
    p = target_logits.detach().float().softmax(-1)
    return -(p * logits.float().log_softmax(-1)).sum(-1)


def published_ar_loss(model: Any, example: StateExample) -> torch.Tensor:
    """
    Mean cross entropy of the tokens of the response, in a forward pass over prompt and response.

    Args:
        model (`transformers.PreTrainedModel`): the model.
        example (`StateExample`): the state; only its prompt and response matter.

    Returns:
        `torch.Tensor` of shape `()`.
    """
    logits = _forward(model, example.sequence_ids)[len(example.prompt_ids) - 1 : -1]
    return F.cross_entropy(logits.float(), torch.tensor(example.response_ids, device=logits.device))


def _target_logits(model: Any, example: StateExample) -> torch.Tensor:
    return _loss_part(_forward(model, example.sequence_ids[: example.end]), example)


def _state_logits(model: Any, example: StateExample) -> torch.Tensor:
    return _loss_part(_forward(model, example.sequence_ids[: example.start] + example.state), example)


def _loss_part(logits: torch.Tensor, example: StateExample) -> torch.Tensor:
    """The logits that predict the tokens from the first wrong one on."""
    return logits[example.start + example.first_wrong - 1 : example.end - 1]


def _forward(model: Any, token_ids: list[int]) -> torch.Tensor:
    return model(torch.tensor([token_ids], device=model.device), use_cache=False).logits[0]
