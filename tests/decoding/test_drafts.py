"""Drafts as trees: what is taken from a beam, how likely acceptance ends where, and how masks are laid out."""

import itertools
import random

import pytest

from cllm_hf.decoding.lossless import Draft, lay_out_masks


def make_tree(rng, size=9):
    parents = [rng.randrange(place) if place > 1 else 0 for place in range(1, size + 1)]
    children = {
        place: [child for child, parent in enumerate(parents, 1) if parent == place] for place in range(size + 1)
    }
    chances = {}
    for place in range(size + 1):
        shares = [rng.random() for _ in range(len(children[place]) + 1)]
        chances.update({child: share / sum(shares) for child, share in zip(children[place], shares)})
    reached = []
    for place in range(1, size + 1):
        reached.append(chances[place] * (reached[parents[place - 1] - 1] if parents[place - 1] else 1.0))
    return Draft(list(range(size)), parents, reached), children, chances


@pytest.mark.parametrize("seed", range(5))
def test_likeliest_ends_are_where_random_walks_end_most_often(seed):
    rng = random.Random(seed)
    draft, children, chances = make_tree(rng)
    counts = dict.fromkeys(range(len(draft.token_ids) + 1), 0)
    for _ in range(20000):
        place = 0
        while True:
            draw, step = rng.random(), None
            for child in children[place]:
                draw -= chances[child]
                if draw < 0:
                    step = child
                    break
            if step is None:
                break
            place = step
        counts[place] += 1
    for most in (1, 3):
        chosen = draft.likeliest_ends(most)
        assert len(chosen) == most and chosen == sorted(chosen)
        best = sum(sorted(counts.values(), reverse=True)[:most])
        assert sum(counts[place] for place in chosen) >= best - 500
    assert draft.likeliest_ends() == draft.likeliest_ends(99) == list(range(len(draft.token_ids) + 1))


def test_a_chain_is_reached_by_the_product_of_its_probabilities():
    draft = Draft.chain([7, 8, 9], [0.5, 0.4, 0.1])
    assert draft.parents == [0, 1, 2]
    assert draft.reached == pytest.approx([0.5, 0.2, 0.02])
    assert draft.likeliest_ends(2) == [0, 1]


def make_beam(rng, depth=4, width=3):
    """Levels of a beam, best first; probabilities fall along every path."""
    levels, before = [], [0.0]
    for _ in range(depth):
        guesses = [(rng.randrange(width), -rng.random()) for _ in range(width)] if levels else None
        level = []
        for number in range(width):
            parent = guesses[number][0] if guesses else 0
            level.append((100 * len(levels) + number, parent, before[parent] - 0.1 - rng.random()))
        level.sort(key=lambda guess: -guess[2])
        levels.append(level)
        before = [score for _, _, score in level]
    return levels


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("num_others", [0, 1, 3, 50])
def test_best_of_a_beam_is_its_best_path_and_the_best_others(seed, num_others):
    levels = make_beam(random.Random(seed))
    draft = Draft.best_of(levels, num_others)
    # By definition: the path to the best guess of the last level, then the others by their score.
    scores = {token: score for level in levels for token, _, score in level}
    parents = {
        token: levels[depth - 1][before][0] if depth else None
        for depth, level in enumerate(levels)
        for token, before, _ in level
    }
    path = [levels[-1][0][0]]
    while parents[path[-1]] is not None:
        path.append(parents[path[-1]])
    others = sorted(scores.keys() - set(path), key=lambda token: -scores[token])[:num_others]
    assert draft.token_ids[: len(path)] == path[::-1]
    assert draft.token_ids[len(path) :] == others
    for place, (token, parent) in enumerate(zip(draft.token_ids, draft.parents), start=1):
        assert parent < place
        assert (draft.token_ids[parent - 1] if parent else None) == parents[token]


def test_within_cuts_branches_and_keeps_who_follows_whom():
    draft, _, _ = make_tree(random.Random(3), 12)

    def paths(one):
        found = {}
        for place, (token, parent) in enumerate(zip(one.token_ids, one.parents), start=1):
            found[place] = (*found.get(parent, ()), token)
        return set(found.values())

    for depth in range(6):
        assert paths(draft.within(depth)) == {path for path in paths(draft) if len(path) <= depth}


def test_filled_drafts_have_the_length_and_no_equal_siblings():
    assert Draft.chain([5, 6], [0.5, 0.5]).fitted(4, 9) == Draft([5, 6, 9, 9], [0, 1, 2, 3], [0.5, 0.25, 0.0, 0.0])
    assert Draft.chain([5, 6], [0.5, 0.5]).fitted(1, 9) == Draft([5], [0], [0.5])
    widened = Draft([2, 0], [0, 0], [0.5, 0.1]).widened(6)
    assert len(widened.token_ids) == 6 and widened.parents == [0] * 6
    assert len(set(widened.token_ids)) == 6


@pytest.mark.parametrize("places", [[0], [1, 3], [0, 1, 2, 3]])
@pytest.mark.parametrize("num_masks", [1, 3])
def test_masks_follow_their_place_one_after_the_other(places, num_masks):
    parents, is_drafter = lay_out_masks([0, 1, 1], places, num_masks)
    assert parents[:4] == [-1, 0, 1, 1]
    assert is_drafter == [False] * 4 + [True] * (len(places) * num_masks)
    blocks = [parents[start : start + num_masks] for start in range(4, len(parents), num_masks)]
    firsts = itertools.count(4, num_masks)
    assert blocks == [[place, *range(first, first + num_masks - 1)] for place, first in zip(places, firsts)]
