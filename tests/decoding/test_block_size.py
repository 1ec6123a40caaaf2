"""The measured block size, on simulated devices and texts with a clock of their own."""

import copy
import math
import pickle
import random
import threading
import types

import pytest
import torch

from cllm_hf.decoding import block_size
from cllm_hf.decoding.block_size import Measurements, make_pace


SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
# Chance that a draft token after right ones is right, by the number of iterations that it was in the block.
UNTRAINED, WEAK, GOOD = (0.01, 0.03, 0.04, 0.05), (0.02, 0.2, 0.3, 0.35), (0.02, 0.55, 0.75, 0.85, 0.9)


class Model:
    """Something with attributes."""


class Simulation:
    """A forward pass over n positions takes `1 + slope * n` seconds, a bit more by chance, and sometimes much more."""

    def __init__(self, slope, chances, num_tokens=50, num_rows=1, seed=0):
        self.slope, self.chances, self.num_tokens, self.num_rows = slope, chances, num_tokens, num_rows
        self.random = random.Random(seed)
        self.now = 0.0

    def run(self, model, option="auto"):
        """Decode the texts of a batch; returns how long it took, and the block sizes."""
        start, sizes = self.now, []
        pace = make_pace(model, option)
        rows = [Text(self.num_tokens, self.chances, self.random) for _ in range(self.num_rows)]
        while rows:
            size = pace.block_size(len(rows), limit := self.num_tokens - max(row.num_done for row in rows))
            assert 1 <= size <= min(limit, pace.max_block_size)
            counts = [row.advance(size) for row in rows]
            self.now += self.seconds(size * len(rows) + (0 if sizes else 20))
            pace.record(size, counts)
            sizes.append(size)
            rows = [row for row in rows if row.num_done < self.num_tokens]
        return self.now - start, sizes

    def seconds(self, num_positions):
        spike = 3.0 if self.random.random() < 0.02 else 1.0
        return (1 + self.slope * num_positions) * math.exp(abs(self.random.gauss(0, 0.05))) * spike

    def mean_seconds(self, option, num_texts=40):
        model = Model()
        return sum(self.run(model, option)[0] for _ in range(num_texts)) / num_texts


class Text:
    """Draft tokens get better with every iteration that they stay in the block."""

    def __init__(self, num_tokens, chances, generator):
        self.num_done, self.ages, self.chances = 0, {}, chances
        self.levels = [generator.random() for _ in range(num_tokens)]

    def advance(self, size):
        count, drafts = 1, range(self.num_done, min(self.num_done + size, len(self.levels)) - 1)
        for place in drafts:
            if self.levels[place] >= self.chances[min(self.ages.get(place, 0), len(self.chances) - 1)]:
                break
            count += 1
        end = self.num_done + size
        self.num_done += count
        self.ages = {place: self.ages.get(place, 0) + 1 for place in range(self.num_done, end)}
        return count


@pytest.fixture
def simulate(monkeypatch):
    """Makes a simulation whose clock is the one that paces read."""

    def make(*args, **kwargs):
        simulation = Simulation(*args, **kwargs)
        monkeypatch.setattr(block_size, "time", types.SimpleNamespace(perf_counter=lambda: simulation.now))
        return simulation

    return make


@pytest.mark.parametrize("num_rows", [1, 8])
@pytest.mark.parametrize("slope", [0.3, 0.1, 0.03, 0.001])
@pytest.mark.parametrize("chances", [(0.0,), UNTRAINED, WEAK, GOOD])
def test_close_to_the_best_fixed_size_learning_included(simulate, slope, chances, num_rows):
    simulation = simulate(slope, chances, num_rows=num_rows)
    best = min(simulation.mean_seconds(size) for size in SIZES)
    assert sum(simulation.mean_seconds("auto") for _ in range(8)) / 8 <= 1.15 * best


@pytest.mark.parametrize("slope", [0.3, 0.03, 0.01])
@pytest.mark.parametrize("chances", [(0.0,), UNTRAINED])
def test_drafts_that_do_not_pay_cost_little_of_a_few_short_texts(simulate, slope, chances):
    simulation = simulate(slope, chances)
    plain = simulation.mean_seconds(1, 100)
    assert sum(simulation.mean_seconds("auto", 6) for _ in range(10)) / 10 <= 1.06 * plain


def test_wide_blocks_after_the_first_texts_where_they_cost_nothing(simulate):
    wide = 0
    for seed in range(10):
        simulation, model = simulate(0.0001, GOOD, 200, seed=seed), Model()
        simulation.run(model)
        _, sizes = simulation.run(model)
        wide += sizes[0] >= 32
    assert wide >= 8  # times are noisy


def test_drafts_that_begin_to_pay_are_found(simulate):
    simulation, model = simulate(0.03, (0.0,), 300), Model()
    for _ in range(3):
        simulation.run(model)
    simulation.chances = GOOD
    for _ in range(12):
        _, sizes = simulation.run(model)
    assert max(set(sizes), key=sizes.count) >= 8


def test_drafts_that_no_longer_pay_are_given_up(simulate):
    simulation, model = simulate(0.03, GOOD, 300), Model()
    for _ in range(3):
        simulation.run(model)
    simulation.chances = (0.0,)
    for _ in range(4):
        _, sizes = simulation.run(model)
    assert sizes.count(1) > 250


def test_a_fixed_size_is_kept_up_to_the_limit(simulate):
    simulation = simulate(0.3, (0.0,), 20)
    _, sizes = simulation.run(Model(), 6)
    assert sizes == [6] * 15 + [5, 4, 3, 2, 1]
    assert make_pace(Model(), 8).max_block_size == 8


def test_nothing_is_known_of_a_new_model(simulate):
    simulation, model = simulate(0.3, (0.0,)), Model()
    simulation.run(model)
    assert make_pace(model, "auto").block_size(1, 99) == 1
    assert make_pace(Model(), "auto").block_size(1, 99) == 16


def test_the_first_times_of_a_size_count_by_the_least():
    known = Measurements()
    for seconds in (9.0, 2.0, 3.0):
        known.add_time(1, 4, seconds)
    assert known.seconds == {1: {4: 2.0}}
    known.add_time(1, 4, 4.0)
    assert 2.0 < known.seconds[1][4] < 4.0


def test_a_change_of_the_machines_speed_meets_all_sizes():
    known = Measurements()
    for size in (1, 8):
        for _ in range(3):
            known.add_time(1, size, 1.0)
    for _ in range(50):
        known.add_time(1, 8, 2.0)
    assert 1.5 < known.seconds[1][1] < known.seconds[1][8] < 2.1


def test_costs_lie_on_lines_through_what_was_measured_and_never_fall():
    known = Measurements()
    known.seconds = {1: {2: 2.0, 6: 4.0, 8: 3.0}}
    costs = {size: known.cost(1, size) for size in SIZES}
    assert {size: costs[size] for size in (2, 4, 6, 8, 64)} == {2: 2.0, 4: 2.5, 6: 3.0, 8: 3.0, 64: 3.0}
    assert costs[1] == pytest.approx(1.75)
    assert known.cost(9, 4) == known.cost(1, 4)  # of the nearest number of rows


def test_gains_agree_with_the_samples_and_follow_the_text():
    known = Measurements()
    for _ in range(200):
        known.add_counts(8, [3, 5])
    gains = known.gains()
    assert gains[1] == 1.0
    assert gains[8] == pytest.approx(4.0, abs=0.05)
    assert gains[4] == pytest.approx(3.5, abs=0.05)  # 3 and 5, cut to 4
    assert gains[16] == pytest.approx(4.0 * 2**0.5, abs=0.1)
    assert max(gains) == 16
    for _ in range(1500):
        known.add_counts(8, [1, 1])
    assert known.gains()[8] == pytest.approx(1.0, abs=0.1)


def test_a_model_is_copied_saved_and_pickled_without_what_was_measured(simulate, tmp_path):
    simulation, model = simulate(0.3, (0.0,)), torch.nn.Linear(2, 2)
    names = set(model.state_dict())
    simulation.run(model)
    assert set(model.state_dict()) == names
    torch.save(model, tmp_path / "model.pt")
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(tmp_path / "model.pt", weights_only=False),
    ]
    assert b"cllm_hf.decoding" not in pickle.dumps(model)  # is loaded where this package is missing
    for other in copies:
        assert make_pace(other, "auto").block_size(1, 99) == 16
    assert make_pace(model, "auto").block_size(1, 99) == 1


def test_each_strategy_has_measurements_of_its_own():
    model = Model()
    make_pace(model, "auto", ("jacobi", 0)).record(16, [1])
    pace = make_pace(model, "auto", ("jacobi", 0))
    pace.record(16, [1])
    pace.record(16, [1])
    assert make_pace(model, "auto", ("jacobi", 0)).block_size(1, 99) == 1
    assert make_pace(model, "auto", ("jacobi", 4)).block_size(1, 99) == 16


def test_threads_share_what_was_measured():
    model, errors = Model(), []

    def decode(seed):
        try:
            chances = random.Random(seed)
            for _ in range(30):
                pace = make_pace(model, "auto")
                for num_rows in (9, 5, 3, 1):
                    for _ in range(10):
                        size = pace.block_size(num_rows, 99)
                        pace.record(size, [chances.randint(1, size) for _ in range(num_rows)])
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=decode, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(vars(model)) == 1
