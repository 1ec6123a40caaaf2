"""Jacobi decoding as a strategy: what the model predicted after the accepted tokens is the next draft."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..blocks.rules import next_draft
from .strategy import Proposal, Room, Row


# The text does not depend on the first guess, only the number of forward passes does: keep that repeatable.
_SEED = 0


@dataclass
class JacobiNotes:
    """What is kept of a row."""

    rest: list[int] = field(default_factory=list)  # what was predicted after the committed tokens
    # tokens for positions that nothing was predicted for, drawn at random from the row's own context (CLLM, arXiv
    # 2403.00835, section 3.1)
    filler: list[int] = field(default_factory=list)


class JacobiStrategy:
    """
    A sliding window over the fixed-point iteration (Jacobi decoding, arXiv 2305.10427; CLLM, arXiv 2403.00835).

    Accepted tokens leave the window, as many new ones enter, and every forward pass checks equally many positions.
    """

    needs_tree = False

    def propose(self, rows: Sequence[Row], room: Room) -> list[Proposal]:
        return [Proposal([row.anchor, *self.draft(row, room.depth)]) for row in rows]

    def observe(self, row: Row, path: list[int], predictions: list[int]) -> None:
        self.notes_of(row).rest = predictions[len(path) :]

    def draft(self, row: Row, length: int) -> list[int]:
        """The current guess of what follows, of this many tokens."""
        notes = self.notes_of(row)
        if len(notes.filler) < length:
            # The row's own context, so that a row has the same draft alone and in a batch.
            source = row.context or row.text or row.pending.ids
            notes.filler = random.Random(_SEED).choices(source, k=length)
        return next_draft(notes.rest, notes.filler[:length])

    def notes_of(self, row: Row) -> JacobiNotes:
        if row.notes is None:
            row.notes = JacobiNotes()
        return row.notes
