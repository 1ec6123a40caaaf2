"""How the blocks of responses that are decoded already converge, without a dataset."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from .._host import base_model_of
from ..blocks.support import check_packable
from ..trajectories.collector import Request, collect_trajectories
from ..trajectories.options import DEFAULT_TOKENS_PER_BATCH
from ..trajectories.responding import batch_by_tokens, limit_tokens
from ..trajectories.statistics import TrajectoryStatistics, measure_trajectories


def measure_convergence(
    model: Any,
    prompts: Sequence[list[int]],
    responses: Sequence[list[int]],
    block_size: int,
    pad_token_id: int = 0,
    stop_ids: Collection[int] = (),
    seed: int = 0,
) -> TrajectoryStatistics:
    """
    Collect the trajectories of a model's own greedy responses, in memory, and measure them.

    Blocks in which a response is not greedy by the model's plain logits, as after a processor of its generation
    config, are left out, and counted. Near ties count as greedy.

    Args:
        model (`transformers.PreTrainedModel` or `peft.PeftModel`): the model, in evaluation mode.
        prompts (`Sequence[list[int]]`): token ids of each prompt, at least one.
        responses (`Sequence[list[int]]`): its response to each; empty ones are left out.
        block_size (`int`): tokens of a block.
        pad_token_id (`int`): stands after the end of a response.
        stop_ids (`Collection[int]`): the model's stop tokens.
        seed (`int`): of the first drafts; the same for two models gives both the same draws.

    Returns:
        `TrajectoryStatistics`.

    Raises:
        ValueError: for a block size below 1, or a model that cannot run packed batches; see `check_packable`.
    """
    model = base_model_of(model)
    check_packable(model)
    requests = [
        Request(list(prompt), list(response), (seed, number))
        for number, (prompt, response) in enumerate(zip(prompts, responses))
        if response
    ]
    sizes = [(len(request.prompt_ids) + len(request.response_ids), len(request.response_ids)) for request in requests]
    total = TrajectoryStatistics(block_size)
    for batch in batch_by_tokens(sizes, limit_tokens(model, DEFAULT_TOKENS_PER_BATCH)):
        chosen = [requests[index] for index in batch]
        found = collect_trajectories(model, chosen, block_size, pad_token_id, stop_ids, keep_not_greedy=True)
        total += measure_trajectories([vars(trajectory) for trajectory in found], block_size)
    return total
