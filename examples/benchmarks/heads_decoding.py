"""Decoding by trained heads, as strategies of `cllm_hf`: the loop verifies what they draft, every text is exact."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache

from cllm_hf import Proposal, Room, Row, Strategy, register_strategy
from cllm_hf._host import base_model_of
from cllm_hf.decoding.caches import copy_cache
from cllm_hf.decoding.lossless import Draft

from .heads import EagleHead, Heads, MedusaHeads


# Guesses for each place that are looked at, where candidates are asked for.
_WIDEST_BEAM = 8
# `(previous_ids, beams) -> logits`: of the tokens after `previous_ids`, `[num_rows, width]`, each of which follows the
# guess of that number in the call before; logits are `[num_rows, width, vocab_size]`.
Step = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def draft(step: Step, anchors: torch.Tensor, depth: int, num_candidates: int) -> list[Draft]:
    """
    Draft by beams: the best path and, beside it, so many other guesses, those with the best products of probabilities.

    Args:
        step (`Step`): gives the logits for each place.
        anchors (`torch.Tensor`): last tokens of the texts, `[num_rows, 1]`.
        depth (`int`): tokens of a path.
        num_candidates (`int`): other guesses at most; 0 for a chain.

    Returns:
        `list[Draft]`: one for each row.
    """
    previous, beams = anchors, torch.zeros_like(anchors)
    scores, levels = torch.zeros_like(anchors, dtype=torch.float32), []
    for _ in range(depth):
        shares = step(previous, beams).float().log_softmax(-1)
        vocab_size = shares.shape[-1]
        width = min(num_candidates + 1, _WIDEST_BEAM, vocab_size)
        scores, best = (scores[..., None] + shares).flatten(1).topk(width, dim=1)  # [num_rows, width]
        previous, beams = best % vocab_size, best // vocab_size
        levels.append(torch.stack([previous.float(), beams.float(), scores], dim=-1))
    found = torch.stack(levels, dim=1).tolist()  # [num_rows, depth, width, 3]; float32 holds any token
    return [
        Draft.best_of(
            [[(int(token), int(beam), score) for token, beam, score in level] for level in row], num_candidates
        )
        for row in found
    ]


class HeadStrategy(ABC):
    """What both kinds share: when there is something to draft from, and what a proposal looks like."""

    def __init__(self, model: Any, num_candidates: int = 0):
        self.model, self.num_candidates = model, num_candidates
        self.needs_tree = num_candidates > 0

    def propose(self, rows: Sequence[Row], room: Room) -> list[Proposal]:
        proposals = {row.index: Proposal([row.anchor]) for row in rows}  # before the prefill nothing is known
        known = [row for row in rows if row.notes is not None]
        num_candidates = self.num_candidates if room.is_tree else 0
        for row, one in zip(known, self.draft(known, room.depth, num_candidates) if known else []):
            parents = [-1, *one.parents] if num_candidates else None
            proposals[row.index] = Proposal([row.anchor, *one.token_ids], parents)
        return [proposals[row.index] for row in rows]

    @abstractmethod
    def draft(self, rows: Sequence[Row], depth: int, num_candidates: int) -> list[Draft]:
        """Draft what follows the anchors of rows of which something was read."""

    @abstractmethod
    def read(self, row: Row, hidden_states: torch.Tensor) -> None:
        """Take the hidden states of what the text of a row has gained."""

    def observe(self, row: Row, path: list[int], predictions: list[int]) -> None:
        pass  # `read` has seen more


class MedusaStrategy(HeadStrategy):
    """Medusa heads on the hidden state that has predicted the anchor."""

    def __init__(self, heads: MedusaHeads, model: Any, num_candidates: int = 0):
        super().__init__(model, num_candidates)
        self.heads, self.output_embeddings = heads, model.get_output_embeddings()

    def read(self, row: Row, hidden_states: torch.Tensor) -> None:
        row.notes = hidden_states[-1]

    def draft(self, rows: Sequence[Row], depth: int, num_candidates: int) -> list[Draft]:
        states = torch.stack([row.notes for row in rows])[:, None]  # [num_rows, 1, hidden_size]
        numbers = iter(range(self.heads.num_heads))

        def step(previous: torch.Tensor, beams: torch.Tensor) -> torch.Tensor:
            # A head does not know what the one before it has guessed.
            return self.heads.logits(next(numbers), states, self.output_embeddings).expand(-1, previous.shape[1], -1)

        anchors = torch.tensor([[row.anchor] for row in rows], device=states.device)
        return draft(step, anchors, min(depth, self.heads.num_heads), num_candidates)


@dataclass
class EagleNotes:
    """What is kept of a row."""

    cache: Any  # of the head, over the pairs that it has read
    num_read: int = 0  # tokens of the text whose hidden states have come
    fresh: list[torch.Tensor] = field(default_factory=list)  # hidden states that the head has not read


class EagleStrategy(HeadStrategy):
    """
    EAGLE's head on the hidden states of the text, then on its own.

    Its cache holds pairs of the text alone: what it drafts goes into a copy, which shares its tensors until it grows.
    """

    def __init__(self, head: EagleHead, model: Any, num_candidates: int = 0):
        super().__init__(model, num_candidates)
        self.head = head
        self.embeddings, self.output_embeddings = model.get_input_embeddings(), model.get_output_embeddings()

    def read(self, row: Row, hidden_states: torch.Tensor) -> None:
        if row.notes is None:
            row.notes = EagleNotes(DynamicCache(config=self.head.decoder.config))
        notes: EagleNotes = row.notes
        # Models without a cache read all again; a prompt of embeddings has no text, and a last hidden state.
        new = max(min(len(hidden_states), len(row.text) - 1 - notes.num_read), 1)
        notes.num_read = len(row.text) - 1
        notes.fresh.append(hidden_states[len(hidden_states) - new :])

    def draft(self, rows: Sequence[Row], depth: int, num_candidates: int) -> list[Draft]:
        return [self._draft(row, depth, num_candidates) for row in rows]

    def _draft(self, row: Row, depth: int, num_candidates: int) -> Draft:
        notes: EagleNotes = row.notes
        states = torch.cat(notes.fresh)[None]  # [1, num_fresh, hidden_size]
        notes.fresh = []
        ids = torch.tensor([row.text[len(row.text) - states.shape[1] :]], device=states.device)
        guessed = self.head(self.embeddings(ids), states, notes.cache)[:, -1:]
        cache: Any = copy_cache(notes.cache)
        is_first = True

        def step(previous: torch.Tensor, beams: torch.Tensor) -> torch.Tensor:
            nonlocal guessed, is_first
            if not is_first:  # the anchor is read already
                cache.reorder_cache(beams[0])
                guessed = self.head(self.embeddings(previous.T), guessed[beams[0]], cache)  # [width, 1, hidden_size]
            is_first = False
            return self.output_embeddings(guessed).transpose(0, 1)

        return draft(step, ids[:, -1:], depth, num_candidates)[0]


def make_strategy(heads: Heads, model: Any, num_candidates: int = 0) -> Strategy:
    """Make the strategy of a kind of heads, for one call of `generate`."""
    if isinstance(heads, MedusaHeads):
        return MedusaStrategy(heads, model, num_candidates)
    return EagleStrategy(heads, model, num_candidates)


def register_heads(name: str, heads: Heads, model: Any) -> None:
    """
    Have `model.generate(decoding=name)` decode by heads.

    Args:
        name (`str`): value of `decoding`.
        heads (`MedusaHeads` or `EagleHead`): what drafts; `jacobi_block_size` says how far, `jacobi_candidates` how
            many guesses stand beside its best path.
        model (`transformers.PreTrainedModel`): what they were trained for, the one that decodes.
    """
    base = base_model_of(model)
    register_strategy(name, lambda options: make_strategy(heads, base, options.candidates))
