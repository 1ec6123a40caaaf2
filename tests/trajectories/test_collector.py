"""Augmented states: only wrong tokens after the first are put right, so many of them, and none twice."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm_hf.trajectories.collector import augment_states


def trajectories(block_size=6, tokens=3):
    state = st.lists(st.integers(0, tokens - 1), min_size=block_size, max_size=block_size)
    return st.lists(state, min_size=1, max_size=6)


def slow_augment(trajectory, length, rng):
    """One draw after another; the generator is asked the same questions as by a draw of several numbers at once."""
    *states, end = trajectory
    made = []
    for state in states[:-1]:
        wrong = {i for i, (token, right) in enumerate(zip(state[:length], end)) if token != right}
        behind_first = sorted(wrong)[1:]
        if not behind_first:
            continue
        put_right = {behind_first[int(draw)] for draw in rng.integers(len(behind_first), size=len(wrong) // 2)}
        made.append([end[i] if i in put_right else token for i, token in enumerate(state)])
    return [state for i, state in enumerate(made) if state not in trajectory and state not in made[:i]]


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(trajectories(), st.integers(1, 6), st.integers(0, 2**32))
def test_equals_the_slow_reference(trajectory, length, seed):
    augmented = augment_states(trajectory, length, np.random.default_rng(seed))
    assert augmented == slow_augment(trajectory, length, np.random.default_rng(seed))
    assert augmented == augment_states(trajectory, length, np.random.default_rng(seed))


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(trajectories(block_size=8, tokens=9), st.integers(1, 8))
def test_only_wrong_tokens_behind_the_first_are_put_right(trajectory, length):
    before = [list(state) for state in trajectory]
    end = trajectory[-1]
    augmented = augment_states(trajectory, length, np.random.default_rng(0))
    assert trajectory == before and len(augmented) <= max(len(trajectory) - 2, 0)
    assert not any(state in trajectory for state in augmented)
    for state in augmented:
        sources = []
        for source in trajectory[:-2]:
            changed = [i for i, (old, new) in enumerate(zip(source, state)) if old != new]
            wrong = [i for i in range(length) if source[i] != end[i]]
            is_source = all(state[i] == end[i] for i in changed) and set(changed) <= set(wrong[1:])
            sources.append(is_source and 1 <= len(changed) <= len(wrong) // 2)
        assert any(sources)


def test_draws_are_with_replacement_and_all_occur():
    trajectory = [[9] * 6, [1] + [9] * 5, [1, 2, 3, 4, 5, 6]]
    rng = np.random.default_rng(0)
    seen = {tuple(state) for _ in range(2000) for state in augment_states(trajectory, 6, rng)}
    # 3 draws with replacement from 5 positions: every set of 1 to 3 of them.
    assert len(seen) == 5 + 10 + 10
    assert all(state[0] == 9 for state in seen)


@pytest.mark.parametrize(
    "trajectory",
    [
        [[1, 2, 3]],
        [[9, 9, 9], [1, 2, 3]],
        [[1, 9, 3], [1, 9, 3], [1, 2, 3]],  # one wrong token
        [[9, 9, 3], [9, 2, 3], [1, 2, 3]],  # what would come of it is there already
    ],
)
def test_trajectories_that_give_none(trajectory):
    assert augment_states(trajectory, 3, np.random.default_rng(0)) == []


def test_padding_stays():
    trajectory = [[9, 9, 9, 7], [9, 9, 9, 8], [1, 2, 3, 0]]
    for seed in range(20):
        (state,) = augment_states(trajectory, 3, np.random.default_rng(seed))
        assert state in ([9, 2, 9, 7], [9, 9, 3, 7])
