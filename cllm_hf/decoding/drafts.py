"""Drafts of an adapter, as trees of tokens: how likely each is reached, and where the next draft shall stand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Draft:
    """A tree of guesses of what follows a text. Place 0 is the anchor; the first guess has place 1."""

    token_ids: list[int] = field(default_factory=list)  # the guesses
    parents: list[int] = field(default_factory=list)  # the place before each; smaller than its own. Siblings differ
    reached: list[float] = field(default_factory=list)  # how likely each is accepted, with all before it

    @classmethod
    def chain(cls, token_ids: Sequence[int], probabilities: Sequence[float]) -> Draft:
        """Make a draft of one guess a token."""
        reached, share = [], 1.0
        for probability in probabilities:
            share *= probability
            reached.append(share)
        return cls(list(token_ids), list(range(len(token_ids))), reached)

    @classmethod
    def best_of(cls, levels: Sequence[Sequence[tuple[int, int, float]]], num_others: int) -> Draft:
        """Make a draft of the best path through a beam, and the best other guesses by their summed log-probability."""
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
        """Cut or fill a chain."""
        missing = max(num_tokens - len(self.token_ids), 0)
        last = range(len(self.token_ids), len(self.token_ids) + missing)  # each after the one before it
        return Draft(
            [*self.token_ids[:num_tokens], *[filler] * missing],
            [*self.parents[:num_tokens], *last],
            [*self.reached[:num_tokens], *[0.0] * missing],
        )

    def widened(self, num_tokens: int) -> Draft:
        """Fill a tree with guesses that nobody has made, side by side after the anchor: no branch gets any longer."""
        missing = num_tokens - len(self.token_ids)
        unused = [token for token in range(num_tokens) if token not in self.token_ids]  # siblings differ
        return Draft(
            [*self.token_ids, *unused[:missing]],
            [*self.parents, *[0] * missing],
            [*self.reached, *[0.0] * missing],
        )

    def within(self, depth: int) -> Draft:
        """Cut the branches of a draft."""
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
        """Find the places where acceptance most likely ends."""
        places = list(range(len(self.token_ids) + 1))
        if most is None or most >= len(places):
            return places
        ends = [1.0, *self.reached]  # reached, and nothing after it is
        for parent, reached in zip(self.parents, self.reached):
            ends[parent] -= reached
        return sorted(sorted(places, key=lambda place: -ends[place])[:most])


def lay_out_masks(parents: Sequence[int], places: Sequence[int], num_masks: int) -> tuple[list[int], list[bool]]:
    """Lay out a draft and a block of masks after some of its places."""
    laid_out = [-1, *parents]
    num_verified = len(laid_out)
    for place in places:
        first = len(laid_out)
        laid_out += [place, *range(first, first + num_masks - 1)]
    return laid_out, [False] * num_verified + [True] * (len(places) * num_masks)
