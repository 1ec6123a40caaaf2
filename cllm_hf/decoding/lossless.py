"""
Lossless decoding: an adapter drafts, and the base model verifies, in one forward pass.

Each forward pass holds the anchor and a draft, which the base weights verify, and after every place of them a block of
masks, on which the adapter acts. Wherever acceptance ends, the block after that place has drafted what follows, on
accepted tokens alone (Apple, arXiv 2507.11851). Keys and values of the masks are dropped. What is committed has only
ever been said by the base model.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from ..blocks.drafter import Drafter, find_drafter
from ..blocks.gate import AdapterGate
from ..options import JacobiOptions
from .rows import Row, Verdict
from .strategy import Guess, Proposal, Room


class LosslessStrategy:
    """
    Drafts by the gated adapter of a model.

    Args:
        gate (`AdapterGate`): of the model.
        drafter (`Drafter`): of the model.
    """

    needs_tree = True
    keeps_branches = False

    def __init__(self, gate: AdapterGate, drafter: Drafter):
        self._gate, self._drafter = gate, drafter
        self._num_masks = 0
        self.largest_block_size = drafter.num_masks + 1

    def running(self) -> AbstractContextManager[None]:
        return self._gate.installed()

    def propose(self, rows: Sequence[Row], room: Room) -> list[Proposal]:
        # Rows of a batch are drafted for alike; those without a draft are so in their first forward pass alone.
        length = room.depth if room.must_fill else min([room.depth, *(len(row.notes or ()) for row in rows)])
        drafts = [[*(row.notes or ()), *[row.anchor] * length][:length] for row in rows]
        if not room.is_tree:
            return [Proposal([row.anchor, *draft]) for row, draft in zip(rows, drafts)]
        parents, is_drafter = lay_out_masks(length, room.depth)
        num_rows = len(parents)
        return [
            Proposal([row.anchor, *draft, *[row.anchor] * (num_rows - length - 1)], parents, is_drafter)
            for row, draft in zip(rows, drafts)
        ]

    def begin(self, proposals: Sequence[Proposal]) -> int:
        _, is_drafter = proposals[0].links()
        count = sum(is_drafter)
        self._num_masks = count // (len(is_drafter) - count)
        self._gate.open(list(range(self._num_masks)) * (len(is_drafter) - count))
        return count

    def observe(self, row: Row, path: list[int], predictions: list[int]) -> None:
        pass  # `draft` has seen more

    def draft(self, rows: Sequence[Row], verdicts: Sequence[Verdict], logits: torch.Tensor, guess: Guess) -> None:
        for row in rows:
            row.notes = []
        going = [number for number, row in enumerate(rows) if not row.is_stopped]
        if not self._num_masks or not going:
            return
        device, count = logits.device, self._num_masks
        first = torch.tensor([[verdicts[number].path[-1] * count] for number in going])
        places = (first + torch.arange(count)).to(device, non_blocking=True)
        blocks = logits[torch.tensor(going).to(device, non_blocking=True)[:, None], places]  # [num_going, count, vocab]
        previous = torch.tensor([verdicts[number].token_ids[-1:] for number in going]).to(device, non_blocking=True)
        drafted = []
        for distance in range(count):
            scores = self._drafter.correct(blocks[:, distance : distance + 1], previous)
            previous = guess([rows[number] for number in going], distance, scores).argmax(-1)  # [num_going, 1]
            drafted.append(previous)
        for number, draft in zip(going, torch.cat(drafted, dim=1).tolist()):
            rows[number].notes = draft


def make_lossless(model: Any, options: JacobiOptions) -> LosslessStrategy:
    """
    Make the strategy of `decoding="lossless"`.

    Args:
        model (`transformers.PreTrainedModel`): the model to decode, not wrapped.
        options (`JacobiOptions`): of this call.

    Returns:
        `LosslessStrategy`.

    Raises:
        ValueError: if the model has no adapter that drafts.
    """
    drafter = find_drafter(model)
    if drafter is None:
        raise ValueError(
            f'`decoding="lossless"` needs an adapter that drafts, got a {type(model).__name__} without one. Train one '
            "with `CLLMConfig(lossless=True)`, and load it with `cllm_hf.load_cllm(folder)`."
        )
    return LosslessStrategy(AdapterGate(model, drafter), drafter)


@functools.lru_cache
def lay_out_masks(draft_length: int, num_masks: int) -> tuple[list[int], list[bool]]:
    """
    Lay out a chain and a block of masks after each of its places.

    Args:
        draft_length (`int`): tokens after the anchor.
        num_masks (`int`): of each block.

    Returns:
        `tuple[list[int], list[bool]]`: parents and flags of a `Proposal`: the chain, then the blocks.
    """
    parents = list(range(-1, draft_length))
    for place in range(draft_length + 1):
        first = len(parents)
        parents += [place, *range(first, first + num_masks - 1)]
    return parents, [False] * (draft_length + 1) + [True] * ((draft_length + 1) * num_masks)
