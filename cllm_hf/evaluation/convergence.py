"""How the blocks of both models converge."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

from .._host import base_model_of
from ..blocks.drafter import find_drafter
from ..blocks.limits import check_packable
from ..journal import Journal
from ..trajectories.collector import Request, collect_trajectories
from ..trajectories.options import DEFAULT_TOKENS_PER_BATCH
from ..trajectories.responding import batch_by_tokens
from ..trajectories.statistics import TrajectoryStatistics, measure_trajectories
from .sides import Run, Side


_MOST_TRAJECTORIES = 128


def measure_sides(
    owners: Sequence[tuple[Side, Run]],
    prompts: Sequence[list[int]],
    block_size: int,
    pad_token_id: int,
    journal: Journal | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """
    Statistics of the trajectories of each model, of which the `generate()` is given too; `None` for a model that
    cannot give any, and the reasons as notes.
    """
    found: dict[str, Any] = {side.name: None for side, _ in owners}
    notes = []
    for side, run in owners:
        if find_drafter(base_model_of(side.model)) is not None:
            notes.append(f"How blocks of the {side.title} converge is not measured: they are those of its base model.")
            continue
        some, responses = list(prompts[:_MOST_TRAJECTORIES]), run.result.responses[:_MOST_TRAJECTORIES]
        stop_ids = sorted(run.method.stop_ids)
        key = [some, responses, block_size, pad_token_id, stop_ids]
        measure = partial(_measure, side.model, some, responses, block_size, pad_token_id, stop_ids)
        try:
            values = (journal or Journal()).once(f"convergence-{side.name}", key, measure)
        except ValueError as error:
            notes.append(f"The trajectories of the {side.title} are not measured: {error}")
            continue
        found[side.name] = values
        num_left_out = TrajectoryStatistics.from_dict(values).num_left_out_blocks
        if num_left_out:
            notes.append(
                f"{num_left_out} blocks of the {side.title} have no trajectory: there its response "
                "is not greedy by its plain logits, as after a processor."
            )
    return found, notes


def _measure(*arguments: Any) -> dict[str, Any]:
    """What `measure_convergence` says, ready for JSON."""
    return measure_convergence(*arguments).to_dict()


def measure_convergence(
    model: Any,
    prompts: Sequence[list[int]],
    responses: Sequence[list[int]],
    block_size: int,
    pad_token_id: int = 0,
    stop_ids: Collection[int] = (),
) -> TrajectoryStatistics:
    """
    Collect the trajectories of a model's own greedy responses, in memory, and measure them.

    Blocks in which a response is not greedy by the model's plain logits, as after a processor of its generation
    config, are left out, and counted. Two models get the same draws of first drafts.
    """
    model = base_model_of(model)
    check_packable(model)
    requests = [
        Request(list(prompt), list(response), (0, number))
        for number, (prompt, response) in enumerate(zip(prompts, responses))
        if response
    ]
    sizes = [(len(request.prompt_ids) + len(request.response_ids), len(request.response_ids)) for request in requests]
    total = TrajectoryStatistics(block_size)
    for batch in batch_by_tokens(sizes, DEFAULT_TOKENS_PER_BATCH):
        chosen = [requests[index] for index in batch]
        found = collect_trajectories(model, chosen, block_size, pad_token_id, stop_ids, keep_not_greedy=True)
        total += measure_trajectories([vars(trajectory) for trajectory in found], block_size)
    return total
