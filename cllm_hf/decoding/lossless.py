"""
Lossless decoding: an adapter drafts, and the base model verifies, in one forward pass.

Each forward pass holds the anchor and a draft, which the base weights verify, and after every place of them a block of
masks, on which the adapter acts. Wherever acceptance ends, the block after that place has drafted what follows, on
accepted tokens alone (Apple, arXiv 2507.11851). Keys and values of the masks are dropped. What is committed has only
ever been said by the base model.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch

from ..blocks.drafter import Drafter, find_drafter
from ..blocks.gate import AdapterGate
from ..options import JacobiOptions
from .rows import Row, Verdict
from .strategy import Guess, Proposal, Room


# A CPU pays for every row, and the two likeliest places are where acceptance ends nine times out of ten; a GPU runs
# a hundred rows in the time of one.
_BLOCKS_ON_A_CPU = 2


@dataclass(frozen=True)
class Draft:
    """
    What is kept of a row: the draft of what follows its text.

    Attributes:
        token_ids (`list[int]`): the draft.
        probabilities (`list[float]`): of each token, by the drafter.
    """

    token_ids: list[int] = field(default_factory=list)
    probabilities: list[float] = field(default_factory=list)

    def cut(self, length: int, filler: int) -> Draft:
        """The draft with this many tokens, some of them a guess that is worth nothing where it has fewer."""
        missing = max(length - len(self.token_ids), 0)
        return Draft([*self.token_ids[:length], *[filler] * missing], [*self.probabilities[:length], *[0.0] * missing])


class LosslessStrategy:
    """
    Drafts by the gated adapter of a model.

    Args:
        gate (`AdapterGate`): of the model.
        drafter (`Drafter`): of the model.
        num_blocks (`int`, *optional*): most places of a draft after which a forward pass drafts on: those where
            acceptance most likely ends. By default all.
    """

    needs_tree = True
    keeps_branches = False

    def __init__(self, gate: AdapterGate, drafter: Drafter, num_blocks: int | None = None):
        self._gate, self._drafter = gate, drafter
        self._most_blocks = num_blocks
        self._num_masks = 0
        self.largest_block_size = drafter.num_masks + 1

    def running(self) -> AbstractContextManager[None]:
        return self._gate.installed()

    def propose(self, rows: Sequence[Row], room: Room) -> list[Proposal]:
        notes = [row.notes.draft if row.notes else Draft() for row in rows]
        length = room.depth if room.must_fill else min(room.depth, max(len(draft.token_ids) for draft in notes))
        drafts = [draft.cut(length, row.anchor) for draft, row in zip(notes, rows)]
        if not room.is_tree:
            return [Proposal([row.anchor, *draft.token_ids]) for row, draft in zip(rows, drafts)]
        return [self._propose(row, draft, room.depth) for row, draft in zip(rows, drafts)]

    def _propose(self, row: Row, draft: Draft, num_masks: int) -> Proposal:
        places = likeliest_ends(draft.probabilities, self._most_blocks)
        row.notes = Notes(draft, places)
        parents, is_drafter = lay_out_masks(len(draft.token_ids), places, num_masks)
        masks = [row.anchor] * (num_masks * len(places))  # their embeddings are put in by the gate
        return Proposal([row.anchor, *draft.token_ids, *masks], parents, is_drafter)

    def begin(self, proposals: Sequence[Proposal]) -> int:
        _, is_drafter = proposals[0].links()
        count = sum(is_drafter)
        num_blocks = len(likeliest_ends([0.0] * (len(is_drafter) - count - 1), self._most_blocks)) if count else 0
        self._num_masks = count // num_blocks if count else 0
        self._gate.open(list(range(self._num_masks)) * num_blocks)
        return count

    def observe(self, row: Row, path: list[int], predictions: list[int]) -> None:
        pass  # `draft` has seen more

    def draft(self, rows: Sequence[Row], verdicts: Sequence[Verdict], logits: torch.Tensor, guess: Guess) -> None:
        blocks = {
            number: row.notes.places.index(verdict.path[-1])
            for number, (row, verdict) in enumerate(zip(rows, verdicts))
            if row.notes and not row.is_stopped and verdict.path[-1] in row.notes.places
        }
        for row in rows:
            row.notes = None
        if not self._num_masks:
            return
        device, count, going = logits.device, self._num_masks, list(blocks)
        # What is not a finite number spreads over all logits of its row.
        is_broken = ~(logits[:, 0].amax(-1).float() < torch.inf).all()
        if not blocks:
            _check_finite(is_broken)
            return

        def send(values: list[Any]) -> torch.Tensor:
            return torch.tensor(values).to(device, non_blocking=True)

        places = send([[block * count] for block in blocks.values()]) + torch.arange(count, device=device)
        chosen = logits[send(going)[:, None], places]  # [num_going, count, vocab_size]
        previous = send([verdicts[number].token_ids[-1:] for number in going])
        tokens, probabilities = [], []
        for distance in range(count):
            corrected = self._drafter.correct(chosen[:, distance : distance + 1], previous)  # [num_going, 1, vocab]
            previous = guess([rows[number] for number in going], distance, corrected).argmax(-1)
            best = corrected.float().gather(-1, previous[..., None])[..., 0]
            tokens.append(previous)
            probabilities.append((best - corrected.float().logsumexp(-1)).exp())
        found = [*tokens, *probabilities, is_broken.expand(len(going), 1)]
        drafted = torch.cat(found, dim=1).tolist()  # in one transfer; float32 holds any token
        _check_finite(drafted[0][-1])
        for number, values in zip(going, drafted):
            draft = Draft([int(token) for token in values[:count]], values[count:-1])
            rows[number].notes = Notes(draft)


def _check_finite(is_broken: Any) -> None:
    """Attention takes what it does not see times 0, which is not 0 where that is not a finite number."""
    if is_broken:
        raise ValueError(
            "A lossless adapter must draft with finite numbers, got others in the drafter's rows, which spoil those "
            "of the base model in the same forward pass. Train it with a lower `learning_rate`, run the model in "
            'bfloat16 instead of float16, or pass `decoding="autoregressive"`.'
        )


@dataclass
class Notes:
    """
    What is kept of a row.

    Attributes:
        draft (`Draft`): of what follows its text.
        places (`list[int]`): places of the last proposal that have a block after them.
    """

    draft: Draft
    places: list[int] = field(default_factory=list)


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
    num_blocks = options.drafts or (_BLOCKS_ON_A_CPU if drafter.masks.device.type == "cpu" else None)
    return LosslessStrategy(AdapterGate(model, drafter), drafter, num_blocks)


def likeliest_ends(probabilities: list[float], most: int | None = None) -> list[int]:
    """
    Find the places of a draft where acceptance most likely ends.

    Args:
        probabilities (`list[float]`): of each token of the draft to be accepted once those before it are.
        most (`int`, *optional*): how many places; by default all.

    Returns:
        `list[int]`: in order, from 0, the anchor, to the last token.
    """
    places = list(range(len(probabilities) + 1))
    if most is None or most >= len(places):
        return places
    ends, reached = [], 1.0
    for probability in probabilities:
        ends.append(reached * (1 - probability))
        reached *= probability
    ends.append(reached)
    return sorted(sorted(places, key=lambda place: -ends[place])[:most])


def lay_out_masks(draft_length: int, places: list[int], num_masks: int) -> tuple[list[int], list[bool]]:
    """
    Lay out a chain and a block of masks after some of its places.

    Args:
        draft_length (`int`): tokens after the anchor.
        places (`list[int]`): where a block stands.
        num_masks (`int`): of each block.

    Returns:
        `tuple[list[int], list[bool]]`: parents and flags of a `Proposal`: the chain, then the blocks.
    """
    parents = list(range(-1, draft_length))
    for place in places:
        first = len(parents)
        parents += [place, *range(first, first + num_masks - 1)]
    return parents, [False] * (draft_length + 1) + [True] * (len(places) * num_masks)
