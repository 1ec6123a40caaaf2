"""
Lossless decoding: an adapter drafts, and the base model verifies, in one forward pass.

Each forward pass holds the anchor and a draft, which the base weights verify, and after their places blocks of masks,
on which the adapter acts. Of a draft of two tokens:

    anchor  draft 1  draft 2 | after the anchor: mask mask | after draft 1: mask mask | after draft 2: mask mask

Wherever acceptance ends, the block after that place has drafted what follows, on accepted tokens alone (Apple, arXiv
2507.11851). Keys and values of the masks are dropped. What is committed has only ever been said by the base model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.utils import logging

from ..blocks.drafter import AdapterGate, Drafter, active_lossless_adapter, find_drafter, is_lossless
from ..options import JacobiOptions
from .strategy import Guess, Proposal, Room, Row, Verdict


# A CPU pays for every row, and with two places hardly fewer tokens are accepted than with all (docs/lossless.md); on a
# GPU, rows of a single text cost little.
_BLOCKS_ON_A_CPU = 2
_LOAD_IT = "Load the adapter with `cllm_hf.load_cllm(folder)`, on a base model of your own with `base_model=`."
# Guesses of a beam that are looked at for each distance from the text, where candidates are asked for.
_WIDEST_BEAM = 8


@dataclass
class Notes:
    """What is kept of a row."""

    draft: Draft  # of what follows its text
    places: list[int] = field(default_factory=list)  # places of the last proposal that have a block after them


class LosslessStrategy:
    """
    Drafts by the gated adapter of a model.

    `num_blocks` is the most places of a draft after which a forward pass drafts on, those where acceptance most likely
    ends; by default all. `num_candidates` tokens of a draft stand beside as many as a chain has: the drafter's further
    choices.
    """

    needs_tree = True

    def __init__(self, gate: AdapterGate, drafter: Drafter, num_blocks: int | None = None, num_candidates: int = 0):
        self._gate, self._drafter = gate, drafter
        self._most_blocks, self._num_candidates = num_blocks, num_candidates
        self._num_masks = 0
        self.largest_block_size = drafter.num_masks + 1
        self.keeps_branches = num_candidates > 0

    def running(self) -> AbstractContextManager[None]:
        return self._gate.installed()

    def propose(self, rows: Sequence[Row], room: Room) -> list[Proposal]:
        drafts = [row.notes.draft if row.notes else Draft() for row in rows]
        # Of rows without a draft in a batch of others any guess will do.
        if self.keeps_branches and room.is_tree:
            drafts = [draft.within(room.depth) for draft in drafts]
            most = max(len(draft.token_ids) for draft in drafts)
            drafts = [draft.widened(most) for draft in drafts]
        else:
            most = room.depth if room.must_fill else max(len(draft.token_ids) for draft in drafts)
            drafts = [draft.fitted(min(most, room.depth), row.anchor) for draft, row in zip(drafts, rows)]
        if not room.is_tree:
            return [Proposal([row.anchor, *draft.token_ids]) for row, draft in zip(rows, drafts)]
        return [self._propose(row, draft, room.depth) for row, draft in zip(rows, drafts)]

    def _propose(self, row: Row, draft: Draft, num_masks: int) -> Proposal:
        places = draft.likeliest_ends(self._most_blocks)
        row.notes = Notes(draft, places)
        parents, is_drafter = lay_out_masks(draft.parents, places, num_masks)
        masks = [row.anchor] * (num_masks * len(places))  # their embeddings are put in by the gate
        return Proposal([row.anchor, *draft.token_ids, *masks], parents, is_drafter)

    def count_drafting(self, block_size: int) -> int:
        num_masks = min(block_size - 1, self._drafter.num_masks)
        num_verified = 1 + num_masks + self._num_candidates
        return num_masks * min(num_verified, self._most_blocks or num_verified)

    def begin(self, proposals: Sequence[Proposal]) -> int:
        _, is_drafter = proposals[0].links()
        count = sum(is_drafter)
        num_verified = len(is_drafter) - count
        num_blocks = min(num_verified, self._most_blocks or num_verified)
        self._num_masks = count // num_blocks
        self._gate.open(list(range(self._num_masks)) * num_blocks)
        return count

    def end(self) -> None:
        self._gate.close()

    def observe(self, row: Row, path: list[int], predictions: list[int]) -> None:
        pass  # `draft` has seen more

    def draft(self, rows: Sequence[Row], verdicts: Sequence[Verdict], logits: torch.Tensor, guess: Guess) -> None:
        # By row, the number of the block of masks after the last accepted place, where there is one.
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
        # What is not a finite number spreads over all logits of its row, and from there over all probabilities.
        if not blocks:
            _check_finite(bool((logits[:, 0].amax(-1).float() < torch.inf).all()))
            return

        def send(values: list[Any]) -> torch.Tensor:
            return torch.tensor(values).to(device, non_blocking=True)

        places = send([[block * count] for block in blocks.values()]) + torch.arange(count, device=device)
        chosen = logits[send(going)[:, None], places]  # [num_going, num_masks, vocab_size]
        bonus = send([verdicts[number].token_ids[-1:] for number in going])
        make = self._make_trees if self._num_candidates else self._make_chains
        for number, draft in zip(going, make([rows[number] for number in going], chosen, bonus, guess)):
            _check_finite(not math.isnan(draft.reached[0]))
            rows[number].notes = Notes(draft)

    def _make_chains(self, rows: list[Row], logits: torch.Tensor, previous: torch.Tensor, guess: Guess) -> list[Draft]:
        """The best guess for each distance, given the one before it; `logits` are `[num_rows, num_masks, vocab]`."""
        tokens, corrected = [], []
        for distance in range(logits.shape[1]):
            corrected.append(self._drafter.correct(logits[:, distance : distance + 1], previous).float())
            previous = guess(rows, distance, corrected[-1]).argmax(-1)  # [B, 1]
            tokens.append(previous)
        count, chosen, every = logits.shape[1], torch.cat(tokens, dim=1), torch.cat(corrected, dim=1)
        probabilities = (every.gather(-1, chosen[..., None])[..., 0] - every.logsumexp(-1)).exp()
        drafted = torch.cat([chosen, probabilities], dim=1).tolist()  # in one transfer; float32 holds any token
        return [Draft.chain([int(token) for token in row[:count]], row[count:]) for row in drafted]

    def _make_trees(self, rows: list[Row], logits: torch.Tensor, bonus: torch.Tensor, guess: Guess) -> list[Draft]:
        """A beam over the distances, of which the best guesses are taken; shapes as in `_make_chains`."""
        num_rows, num_masks, vocab_size = logits.shape
        width = min(self._num_candidates + 1, _WIDEST_BEAM, vocab_size)
        previous, scores, levels = bonus, logits.new_zeros((num_rows, 1), dtype=torch.float32), []
        for distance in range(num_masks):
            corrected = self._drafter.correct(logits[:, distance : distance + 1], previous)  # [B, width, vocab]
            shares = guess(rows, distance, corrected).log_softmax(-1)
            scores, best = (scores[..., None] + shares).flatten(1).topk(width, dim=1)  # [B, width]
            previous = best % vocab_size
            levels.append(torch.stack([previous.double(), (best // vocab_size).double(), scores.double()], dim=-1))
        beams = torch.stack(levels, dim=1).tolist()  # [B, num_masks, width, 3], in one transfer
        return [
            Draft.best_of(
                [[(int(token), int(before), score) for token, before, score in level] for level in beam],
                self._num_candidates,
            )
            for beam in beams
        ]


def _check_finite(is_finite: bool) -> None:
    """Attention takes what it does not see times 0, which is not 0 where that is not a finite number."""
    if not is_finite:
        raise ValueError(
            "A lossless adapter must draft with finite numbers, got others in the drafter's rows, which spoil those "
            "of the base model in the same forward pass. Train it with a lower `learning_rate`, run the model in "
            'bfloat16 instead of float16, or pass `decoding="autoregressive"`.'
        )


@dataclass(frozen=True)
class Draft:
    """A tree of guesses of what follows a text. Place 0 is the anchor; the first guess has place 1."""

    token_ids: list[int] = field(default_factory=list)  # the guesses
    parents: list[int] = field(default_factory=list)  # the place before each; smaller than its own. Siblings differ
    reached: list[float] = field(default_factory=list)  # how likely each is accepted, with all before it

    @classmethod
    def chain(cls, token_ids: Sequence[int], probabilities: Sequence[float]) -> Draft:
        """A draft of one guess a token; `probabilities` are those of each to be accepted once those before it are."""
        reached, share = [], 1.0
        for probability in probabilities:
            share *= probability
            reached.append(share)
        return cls(list(token_ids), list(range(len(token_ids))), reached)

    @classmethod
    def best_of(cls, levels: Sequence[Sequence[tuple[int, int, float]]], num_others: int) -> Draft:
        """
        The best path through a beam, then the best other guesses by their summed log-probability, at most this many.

        `levels` has for each distance from the text the guesses, best first: token, number of the guess before it in
        the level before, and log-probability of it and all before it. A draft holds no guess without the one before.
        """
        number, path = 0, []
        for depth in reversed(range(len(levels))):
            path.append((depth, number))
            number = levels[depth][number][1]
        chosen = path[::-1]
        others = [(depth, number) for depth, level in enumerate(levels) for number in range(len(level))]
        others = sorted(set(others) - set(chosen), key=lambda one: (-levels[one[0]][one[1]][2], one))
        places: dict[tuple[int, int], int] = {}
        draft = cls()
        for depth, number in [*chosen, *others[:num_others]]:
            token, before, score = levels[depth][number]
            if depth and (depth - 1, before) not in places:
                continue  # rounding has made a guess likelier than what it follows
            places[depth, number] = len(draft.token_ids) + 1
            draft.token_ids.append(token)
            draft.parents.append(places[depth - 1, before] if depth else 0)
            draft.reached.append(math.exp(score))
        return draft

    def fitted(self, num_tokens: int, filler: int) -> Draft:
        """A chain cut or filled to this many guesses, by a token that is as good a guess as any."""
        missing = max(num_tokens - len(self.token_ids), 0)
        last = range(len(self.token_ids), len(self.token_ids) + missing)  # each after the one before it
        return Draft(
            [*self.token_ids[:num_tokens], *[filler] * missing],
            [*self.parents[:num_tokens], *last],
            [*self.reached[:num_tokens], *[0.0] * missing],
        )

    def widened(self, num_tokens: int) -> Draft:
        """
        A tree filled up to this many guesses by some that nobody has made, side by side after the anchor: no branch
        gets any longer.
        """
        missing = num_tokens - len(self.token_ids)
        unused = [token for token in range(num_tokens) if token not in self.token_ids]  # siblings differ
        return Draft(
            [*self.token_ids, *unused[:missing]],
            [*self.parents, *[0] * missing],
            [*self.reached, *[0.0] * missing],
        )

    def within(self, depth: int) -> Draft:
        """A draft with no branch of more tokens than this."""
        kept = Draft()
        places, depths = {0: 0}, {0: 0}
        for place, guess in enumerate(zip(self.token_ids, self.parents, self.reached), start=1):
            token, parent, reached = guess
            depths[place] = depths[parent] + 1
            if depths[place] > depth:
                continue
            places[place] = len(kept.token_ids) + 1
            kept.token_ids.append(token)
            kept.parents.append(places[parent])
            kept.reached.append(reached)
        return kept

    def likeliest_ends(self, most: int | None = None) -> list[int]:
        """The places where acceptance most likely ends, in order; by default all."""
        places = list(range(len(self.token_ids) + 1))
        if most is None or most >= len(places):
            return places
        ends = [1.0, *self.reached]  # reached, and nothing after it is
        for parent, reached in zip(self.parents, self.reached):
            ends[parent] -= reached
        return sorted(sorted(places, key=lambda place: -ends[place])[:most])


def lay_out_masks(parents: Sequence[int], places: Sequence[int], num_masks: int) -> tuple[list[int], list[bool]]:
    """Parents and flags of a `Proposal`: the anchor, a draft, and a block of masks after each of some places."""
    laid_out = [-1, *parents]
    num_verified = len(laid_out)
    for place in places:
        first = len(laid_out)
        laid_out += [place, *range(first, first + num_masks - 1)]
    return laid_out, [False] * num_verified + [True] * (len(places) * num_masks)


def make_lossless(model: Any, options: JacobiOptions) -> LosslessStrategy:
    """Make the strategy of `decoding="lossless"`."""
    drafter = find_drafter(model)
    if drafter is None:
        reason = _why_not_drafting(model) or (
            "has none. Train one with `CLLMConfig(lossless=True)`, and load it with `cllm_hf.load_cllm(folder)`."
        )
        raise ValueError(
            f'`decoding="lossless"` needs an adapter that drafts, got a {type(model).__name__} that {reason}'
        )
    num_blocks = options.drafts or (
        _BLOCKS_ON_A_CPU + options.candidates if drafter.masks.device.type == "cpu" else None
    )
    return LosslessStrategy(AdapterGate(model, drafter), drafter, num_blocks, options.candidates)


def _why_not_drafting(model: Any) -> str:
    """What is wrong with a model that has a lossless adapter and does not draft; empty for one without."""
    configs = getattr(model, "peft_config", None)
    names = [name for name, config in configs.items() if is_lossless(config)] if isinstance(configs, dict) else []
    if not names:
        return ""
    if active_lossless_adapter(model) is None:
        return (
            f"has one, {names[0]!r}, which is not active, or not alone. Call `model.set_adapter({names[0]!r})` before."
        )
    return f"has one without its drafter, which PEFT alone does not load. {_LOAD_IT}"


def warn_without_drafter(model: Any) -> None:
    """Say once of a model whose lossless adapter is active without its drafter that it decodes no faster for it."""
    if active_lossless_adapter(model) is not None and find_drafter(model) is None:
        logging.get_logger(__name__).warning_once(
            f"This {type(model).__name__} decodes as its base model does, one token after the other: it has a "
            f"lossless adapter, but not its drafter, which PEFT alone does not load. {_LOAD_IT}"
        )
