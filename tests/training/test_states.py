"""Which states are chosen and how blocks are cut, against loops and slow references."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm_hf.training.states import (
    choose_progressively,
    choose_uniformly,
    cut_blocks,
    position_weights,
    take_states,
    wrong_context,
)


LARGEST_DRAW = 1 - 2**-24  # the largest float32 below 1
quickly = settings(max_examples=200, deadline=None, derandomize=True, database=None)
draws_in_range = st.one_of(st.floats(0, LARGEST_DRAW, width=32), st.just(LARGEST_DRAW))
small_blocks = st.integers(1, 6).flatmap(
    lambda size: st.tuples(*[st.lists(st.integers(0, 2), min_size=size, max_size=size)] * 2)
)


@quickly
@given(count=st.integers(0, 9), draw=draws_in_range, states_per_block=st.integers(1, 9))
def test_uniform_choice_is_in_range_and_of_different_states_if_there_are_enough(count, draw, states_per_block):
    chosen = choose_uniformly(torch.tensor([[count]]), torch.tensor([[draw]]), states_per_block)
    assert chosen.shape == (1, states_per_block, 1) and chosen.dtype == torch.long
    tokens = chosen.flatten().tolist()
    assert all(0 <= one < max(count, 1) for one in tokens)
    assert len(set(tokens)) == max(min(count, states_per_block), 1)
    # Where there are too few, none is taken much more often than another.
    counts = [tokens.count(one) for one in range(max(count, 1))]
    assert max(counts) - min(counts) <= 1 or count > states_per_block


@pytest.mark.parametrize("states_per_block", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_uniform_choice_takes_every_state_equally_often(count, states_per_block):
    """Over draws that lie evenly in [0, 1), exactly."""
    num_draws = 60 * count * states_per_block
    draws = ((torch.arange(num_draws) + 0.5) / num_draws)[:, None]
    chosen = choose_uniformly(torch.full((num_draws, 1), count), draws, states_per_block)
    counts = torch.bincount(chosen.flatten(), minlength=count)
    assert counts.tolist() == [num_draws * states_per_block // count] * count


def test_uniform_choice_of_each_block_follows_its_own_number():
    chosen = choose_uniformly(torch.tensor([[2, 4], [8, 0]]), torch.tensor([[0.5, 0.99], [0.0, 0.3]]), 1)
    assert chosen.tolist() == [[[1, 3]], [[0, 0]]]


def slow_schedule(candidates, fixed_points, states_per_block, window):
    """Distance of each state's noise from the wanted one, `[shift][block][state]`, straight from the paper."""
    distances = []
    for shift in range(states_per_block):
        ratios = np.linspace(0, 1, window) if window > 1 else np.ones(1)
        row = []
        for block, states in enumerate(candidates):
            wanted = ratios[(block + shift * window // states_per_block) % window]
            noises = []
            for state in states:
                n = len(state)
                first_wrong = next((i for i in range(n) if state[i] != fixed_points[block][i]), n)
                noises.append((n - first_wrong) / n)
            row.append([abs(noise - wanted) for noise in noises])
        distances.append(row)
    return distances


@quickly
@given(data=st.data(), states_per_block=st.integers(1, 3), window=st.integers(1, 6))
def test_progressive_choice_takes_the_nearest_noise(data, states_per_block, window):
    size, num_blocks, most = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 7)), data.draw(st.integers(1, 4))
    tokens = torch.tensor(
        data.draw(st.lists(st.integers(0, 2), min_size=num_blocks * most * size, max_size=num_blocks * most * size))
    )
    candidates = tokens.view(1, num_blocks, most, size)
    counts = [data.draw(st.integers(1, most)) for _ in range(num_blocks)]
    fixed_points = torch.ones(1, num_blocks, size, dtype=torch.long)
    chosen = choose_progressively(candidates, torch.tensor([counts]), fixed_points, states_per_block, window)
    assert chosen.shape == (1, states_per_block, num_blocks)
    available = [states[:count] for states, count in zip(candidates[0].tolist(), counts)]
    distances = slow_schedule(available, fixed_points[0].tolist(), states_per_block, window)
    for shift, block in itertools.product(range(states_per_block), range(num_blocks)):
        choice = chosen[0, shift, block].item()
        assert choice < counts[block]
        assert distances[shift][block][choice] == pytest.approx(min(distances[shift][block]), abs=1e-6)


def test_progressive_choice_rises_from_right_to_wrong_in_cycles():
    fixed_points = torch.full((1, 8, 4), 7)
    right = torch.arange(5)[:, None] <= torch.arange(4)  # state `j` has `j` leading right tokens
    candidates = torch.where(right, 0, 7).expand(1, 8, 5, 4)
    chosen = choose_progressively(candidates, torch.full((1, 8), 5), fixed_points, 1, window=5)
    assert chosen[0, 0].tolist() == [4, 3, 2, 1, 0, 4, 3, 2]
    # Shifted by half a window: no block gives the same state twice.
    chosen = choose_progressively(candidates, torch.full((1, 8), 5), fixed_points, 2, window=5)
    assert (chosen[0, 0] != chosen[0, 1]).all()


def test_missing_blocks_choose_the_first_state():
    candidates, nothing = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, dtype=torch.long)
    chosen = choose_progressively(candidates, nothing, torch.zeros(1, 2, 4).long(), 2, 3)
    assert chosen.tolist() == [[[0, 0], [0, 0]]]
    assert choose_uniformly(nothing, torch.full((1, 2), 0.9), 2).tolist() == [[[0, 0], [0, 0]]]


def test_states_are_taken_block_by_block():
    candidates = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5)
    chosen = torch.tensor([[[0, 3, 1], [2, 2, 2]], [[1, 1, 0], [3, 0, 2]]])
    drafts = take_states(candidates, chosen)
    assert drafts.shape == (2, 2, 15)
    for row, which in itertools.product(range(2), range(2)):
        expected = [candidates[row, block, chosen[row, which, block]] for block in range(3)]
        assert torch.equal(drafts[row, which], torch.cat(expected))


@pytest.mark.parametrize("block_size", [1, 3, 4, 5, 12, 13, 40])
def test_blocks_of_any_size_are_cut_from_drafts(block_size):
    generator = torch.Generator().manual_seed(0)
    drafts, successors = torch.randint(1, 50, (2, 3, 2, 12), generator=generator)
    responses, lengths = torch.randint(1, 50, (3, 12), generator=generator), torch.tensor([12, 1, 7])
    blocks = cut_blocks(drafts, responses, lengths, block_size, successors)
    seen = 0
    for row, length in enumerate(lengths.tolist()):
        rest = {(which, start) for which in range(2) for start in range(0, length, block_size)}
        cut = {}
        for block in blocks.mask[row].nonzero()[:, 0].tolist():
            start = int(blocks.offsets[row, block])
            # Blocks of the first draft come before those of the second.
            which = int(any(one == start for one, _ in cut))
            cut[start, which] = block
            end = min(start + block_size, 12)
            assert torch.equal(blocks.states[row, block, : end - start], drafts[row, which, start:end])
            assert torch.equal(blocks.successors[row, block, : end - start], successors[row, which, start:end])
            assert torch.equal(blocks.fixed_points[row, block, : end - start], responses[row, start:end])
            assert not blocks.states[row, block, end - start :].any()
            assert not blocks.fixed_points[row, block, end - start :].any()
            rest.remove((which, start))
            seen += 1
        assert not rest
    assert seen == int(blocks.mask.sum())
    assert cut_blocks(drafts, responses, lengths, block_size).successors is None


def test_blocks_are_no_longer_than_the_drafts():
    """Noisy context takes many blocks together; what lies beyond every response would only cost columns."""
    drafts, lengths = torch.ones(2, 1, 12, dtype=torch.long), torch.tensor([12, 3])
    responses = torch.ones(2, 10, dtype=torch.long)  # as long as the longest response, not as its blocks
    blocks = cut_blocks(drafts, responses, lengths - 2, 256, drafts)
    assert blocks.states.shape == blocks.successors.shape == blocks.fixed_points.shape == (2, 1, 12)
    assert blocks.fixed_points.tolist() == [[[1] * 10 + [0] * 2]] * 2


@quickly
@given(rows=small_blocks)
def test_wrong_context_is_what_a_loop_finds(rows):
    state, target = rows
    states, targets = torch.tensor([rows[0]]), torch.tensor([rows[1]])
    wrong = [sum(state[k] != target[k] for k in range(i)) for i in range(len(state))]
    assert wrong_context(states, targets).tolist() == [[count > 0 for count in wrong]]


@quickly
@given(trained=st.lists(st.booleans(), min_size=1, max_size=8), decay=st.one_of(st.none(), st.floats(0.1, 50)))
def test_position_weights_fall_from_the_first_trained_position(trained, decay):
    expected, place = [], 0
    for one in trained:
        expected.append((1.0 if decay is None else math.exp(-place / decay)) if one else 0.0)
        place += one
    weights = position_weights(torch.tensor([trained, trained]), decay)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, torch.tensor([expected, expected]))
