"""
Candidates: further guesses beside the draft, verified in the same forward pass.

Jacobi decoding has one guess of what follows. A pool of n-grams has others: from the prompt and the text so far
(prompt lookup), and from what was rejected, whose tail often is right again after the token that replaces it (n-gram
pools of lookahead decoding, arXiv 2402.02057, and rejection recycling, arXiv 2512.14681). They stand beside the draft
as branches of a tree.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from .jacobi import JacobiNotes, JacobiStrategy
from .strategy import Proposal, Room, Row


# Longest and shortest run of tokens by which a place of the text is found again, and places that are kept of each.
_LONGEST_MATCH, _SHORTEST_MATCH = 3, 1
_PLACES_KEPT = 4
# Rejected drafts that are kept.
_REJECTED_KEPT = 4


class NgramIndex:
    """Where in a text its last tokens stood before."""

    def __init__(self) -> None:
        self._places: dict[tuple[int, ...], deque[int]] = {}
        self._length = 0

    def extend(self, text: list[int]) -> None:
        """Take note of what a text has gained."""
        for end in range(self._length, len(text)):  # the last token has nothing after it yet
            for length in range(_SHORTEST_MATCH, min(_LONGEST_MATCH, end) + 1):
                key = tuple(text[end - length : end])
                self._places.setdefault(key, deque(maxlen=_PLACES_KEPT)).append(end)
        self._length = len(text)

    def continuations(self, text: list[int], length: int) -> Iterator[list[int]]:
        """What followed the last tokens of a text before: after the longest matches first, of those the latest."""
        for match in range(min(_LONGEST_MATCH, len(text)), _SHORTEST_MATCH - 1, -1):
            for place in reversed(self._places.get(tuple(text[-match:]), ())):
                following = text[place : place + length]
                # A text that repeats itself goes on doing so.
                yield (following * (length // len(following) + 1))[:length]


@dataclass
class CandidateNotes(JacobiNotes):
    """What is kept of a row."""

    index: NgramIndex = field(default_factory=NgramIndex)  # of its text
    # Drafts that were rejected, from the first wrong token on; the latest first.
    rejected: deque[list[int]] = field(default_factory=lambda: deque(maxlen=_REJECTED_KEPT))
    proposal: Proposal | None = None  # the last one
    draft: list[int] = field(default_factory=list)  # the first branch of it


class CandidateStrategy(JacobiStrategy):
    """Jacobi decoding with further branches from a pool of n-grams."""

    needs_tree = True

    def __init__(self, num_candidates: int):
        self.num_candidates = num_candidates

    def propose(self, rows: Sequence[Row], room: Room) -> list[Proposal]:
        return [self._propose(row, room) for row in rows]

    def _propose(self, row: Row, room: Room) -> Proposal:
        notes = self.notes_of(row)
        branches = [self.draft(row, room.depth)]
        if room.is_tree:
            notes.index.extend(row.text)
            for guess in self._guesses(row, notes, room.depth):
                if len(branches) > self.num_candidates:
                    break
                if guess and not any(branch[: len(guess)] == guess for branch in branches):
                    branches.append(guess)
        notes.draft, notes.proposal = branches[0], merge_branches(row.anchor, branches)
        return notes.proposal if room.is_tree else Proposal(notes.proposal.token_ids)

    def _guesses(self, row: Row, notes: CandidateNotes, length: int) -> Iterator[list[int]]:
        yield from notes.index.continuations(row.text, length)
        for guess in notes.rejected:
            yield guess[1 : length + 1]
            if row.anchor in guess:
                yield guess[guess.index(row.anchor) + 1 :][:length]

    def observe(self, row: Row, path: list[int], predictions: list[int]) -> None:
        notes = self.notes_of(row)
        if notes.proposal is None:  # there was no room for one
            return super().observe(row, path, predictions)
        notes.rest = [predictions[place] for place in places_after(notes.proposal, path[-1])]
        if len(notes.draft) >= len(path):
            notes.rejected.appendleft(notes.draft[len(path) - 1 :])
        notes.proposal = None

    def notes_of(self, row: Row) -> CandidateNotes:
        if row.notes is None:
            row.notes = CandidateNotes()
        return row.notes


def merge_branches(anchor: int, branches: list[list[int]]) -> Proposal:
    """Make a tree of guesses, in which those that begin alike share their beginning."""
    token_ids, parents = [anchor], [-1]
    children: dict[tuple[int, int], int] = {}
    for branch in branches:
        place = 0
        for token in branch:
            child = children.get((place, token))
            if child is None:
                child = children[place, token] = len(token_ids)
                token_ids.append(token)
                parents.append(place)
            place = child
    return Proposal(token_ids, parents)


def places_after(proposal: Proposal, place: int) -> list[int]:
    """The places after one of a tree, to the end of its branch, by the first of several."""
    places: list[int] = []
    parents = proposal.parents or []
    for child in range(place + 1, len(parents)):
        if parents[child] == (places[-1] if places else place):
            places.append(child)
    return places
