"""Where two texts of one model part, and whether the rounding of its dtype alone can decide there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .._host import input_device, plain_positions
from .rules import gap_to_best, near_tie_bound


@dataclass(frozen=True)
class Parting:
    """The first place at which two responses to a prompt differ, and how the model's logits stand there."""

    place: int
    # How far the logit of the lower one of the two tokens lies below the best one, and what rounding can do to it;
    # `None` where one response is the beginning of the other.
    gap: float | None = None
    bound: float | None = None

    @property
    def is_near_tie(self) -> bool:
        """Whether both tokens count as greedy."""
        return self.gap is not None and self.bound is not None and self.gap <= self.bound

    @property
    def gap_in_bounds(self) -> float | None:
        """The gap over the bound: 1 or less at a near tie."""
        return None if self.gap is None or not self.bound else self.gap / self.bound


@torch.no_grad()
def find_parting(model: Any, prompt: Sequence[int], ours: Sequence[int], theirs: Sequence[int]) -> Parting | None:
    """Where two responses part, by one plain forward pass over the text before; `None` if they are equal."""
    if list(ours) == list(theirs):
        return None
    place = next((number for number, pair in enumerate(zip(ours, theirs)) if pair[0] != pair[1]), None)
    if place is None:
        return Parting(min(len(ours), len(theirs)))
    ids = torch.tensor([[*prompt, *ours[:place]]], device=input_device(model))
    last = model(ids, **plain_positions(model, ids), use_cache=False).logits[0, -1:]  # [1, vocab_size]
    both = torch.tensor([ours[place], theirs[place]], device=last.device)
    gap = gap_to_best(last.expand(2, -1), both).max().item()
    return Parting(place, gap, near_tie_bound(last[0], model.dtype).item())


def describe_parting(parting: Parting) -> str:
    """A sentence on two texts that part."""
    start = f"The texts differ from token {parting.place + 1} on"
    if parting.gap is None:
        return f"{start}, where one of them ends."
    kind = "at a near tie" if parting.is_near_tie else "not at a near tie"
    return f"{start}, {kind}: a gap of {parting.gap:.3g} between logits, where rounding explains {parting.bound:.3g}."
