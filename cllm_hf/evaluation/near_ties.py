"""Responses of several methods that differ: whether they part where rounding decides between two tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from .._host import input_device
from ..blocks.ties import judge_greedy
from .benchmark import DecodingMethod, DecodingResult


def near_tie_notes(
    prompts: Sequence[list[int]], compared: Iterable[tuple[DecodingMethod, DecodingResult, DecodingResult]]
) -> list[str]:
    """
    Say of each method how many of the responses that differ from those of another part at a near tie.

    Args:
        prompts (`Sequence[list[int]]`): token ids of each prompt.
        compared (`Iterable[tuple]`): a method, its result, and that of a method with the same model.

    Returns:
        `list[str]`: a sentence for each method with such responses.
    """
    notes = []
    for method, result, baseline in compared:
        pairs = [
            (prompt, ours, theirs)
            for prompt, ours, theirs in zip(prompts, result.responses, baseline.responses)
            if ours != theirs
        ]
        if pairs:
            number = sum(parts_at_near_tie(method.model, *pair) for pair in pairs)
            noun = "response that differs parts" if len(pairs) == 1 else "responses that differ part"
            notes.append(
                f"{result.name}: {number} of {len(pairs)} {noun} from those of {baseline.name} at a near tie, where "
                "the rounding of the dtype decides between two tokens."
            )
    return notes


@torch.no_grad()
def parts_at_near_tie(model: Any, prompt: Sequence[int], ours: Sequence[int], theirs: Sequence[int]) -> bool:
    """
    Find out whether both tokens at the first difference of two responses count as greedy.

    Args:
        model (`transformers.PreTrainedModel` or `peft.PeftModel`): the model that wrote both, in evaluation mode.
        prompt (`Sequence[int]`): token ids.
        ours (`Sequence[int]`): a response.
        theirs (`Sequence[int]`): another one.

    Returns:
        `bool`: `False` also where one is the beginning of the other.
    """
    place = next((number for number, pair in enumerate(zip(ours, theirs)) if pair[0] != pair[1]), None)
    if place is None:
        return False
    ids = torch.tensor([[*prompt, *ours[:place]]], device=input_device(model))
    last = model(ids, use_cache=False).logits[0, -1:].expand(2, -1)
    both = torch.tensor([ours[place], theirs[place]], device=last.device)
    best, near_ties = judge_greedy(last, both, model.dtype)
    return bool(((best == both) | near_ties).all())
