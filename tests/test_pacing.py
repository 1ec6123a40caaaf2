"""The measured block size, on simulated devices and models with a clock of their own."""

import random

import pytest

from cllm_hf.decoding.pacing import AutoPace, Experience, FixedPace, Gains, make_pace
from cllm_hf.options import DEFAULT_BLOCK_SIZE


class Simulation:
    """
    A forward of n tokens takes `1 + slope * (n - 1)` seconds; a draft token behind right ones is right with
    probability `chance`, if there was a prediction to draft from.
    """

    def __init__(self, slope, chance, num_tokens=300, seed=0):
        self.slope, self.chance, self.num_tokens = slope, chance, num_tokens
        self.random = random.Random(seed)
        self.now = 0.0

    def run(self, pace):
        """Decode a text; returns how long it took behind the prefill, and the block sizes."""
        sizes, generated = [], 1
        pace.block_size(1, self.num_tokens)
        self.now += 5.0
        pace.record(1, [1])
        start, last_size = self.now, 1
        while generated < self.num_tokens:
            size = pace.block_size(1, self.num_tokens - generated)
            count = 1
            while count < size and self.random.random() < (self.chance if last_size > 1 else 0):
                count += 1
            self.now += (1 + self.slope * (size - 1)) * self.random.uniform(1.0, 1.05)
            pace.record(size, [count])
            generated += count
            sizes.append(size)
            last_size = size
        return self.now - start, sizes


DEVICES = [0.3, 0.1, 0.03, 0.002]


def seconds_of_the_best_fixed_size(slope, chance):
    simulation = Simulation(slope, chance)
    sizes = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
    return min(sum(simulation.run(FixedPace(size))[0] for _ in range(30)) / 30 for size in sizes)


@pytest.mark.parametrize("slope", DEVICES)
@pytest.mark.parametrize("chance", [0.0, 0.02, 0.5, 0.8, 0.95])
def test_close_to_the_best_fixed_size_once_it_has_seen_a_text(slope, chance):
    simulation, experience = Simulation(slope, chance), Experience()
    times = [simulation.run(AutoPace(experience, lambda: simulation.now))[0] for _ in range(60)]
    assert sum(times[20:]) / 40 <= 1.15 * seconds_of_the_best_fixed_size(slope, chance)


@pytest.mark.parametrize("slope", DEVICES[:3])
def test_drafts_that_never_pay_are_given_up(slope):
    simulation, experience = Simulation(slope, 0.0), Experience()
    first, sizes = simulation.run(AutoPace(experience, lambda: simulation.now))
    later, later_sizes = simulation.run(AutoPace(experience, lambda: simulation.now))
    assert sizes.count(1) > 250 and later_sizes.count(1) > 250
    assert first < 1.1 * 299 * 1.025 and later < 1.05 * 299 * 1.025


def test_drafts_that_begin_to_pay_are_found():
    simulation, experience = Simulation(0.03, 0.0), Experience()
    simulation.run(AutoPace(experience, lambda: simulation.now))
    simulation.chance = 0.95
    for _ in range(12):
        _, sizes = simulation.run(AutoPace(experience, lambda: simulation.now))
    assert max(set(sizes), key=sizes.count) >= 8


def test_what_other_sizes_say_of_one_that_was_not_tried():
    gains = Gains()
    assert gains.is_empty
    assert gains.hopes() == {size: size**0.5 for size in (1, 2, 3, 4, 6, 8)}
    for count in [3, 5] * 100:
        gains.add(8, [count])
    hopes = gains.hopes()
    assert not gains.is_empty and max(hopes) == 16
    one, four, eight, sixteen = (hopes[size] for size in (1, 4, 8, 16))
    assert one == 1.0
    assert four == pytest.approx(3.5, abs=0.01)  # at most what is left of 3 and 5 when cut to 4
    assert eight == pytest.approx(4.0, abs=0.01)
    assert sixteen == pytest.approx(4.0 * 2**0.5, abs=0.05)
    for _ in range(100):
        gains.add(4, [2])
    assert gains.hopes()[4] == pytest.approx(2.0, abs=0.01)  # its own samples


def test_samples_fade():
    gains = Gains()
    for _ in range(30):
        gains.add(16, [1])
    assert gains.hopes()[8] < 1.1
    for _ in range(4000):
        gains.add(1, [1])
    assert gains.hopes()[8] == pytest.approx(8**0.5, abs=0.01)  # as if nothing were known


def test_times_between_measured_ones_lie_on_a_line():
    experience = Experience()
    for size, seconds in ((1, 2.0), (9, 6.0)):
        experience.add_time(1, size, 3 * seconds)  # the first time pays for what is set up once
        experience.add_time(1, size, seconds)
    cost = experience.costs(1)
    assert [cost(size) for size in (1, 5, 9, 17)] == [2.0, 4.0, 6.0, 10.0]
    assert experience.knows(1, 9) and not experience.knows(8, 9)
    assert experience.costs(8)(5) == 4.0  # of the nearest number of rows


def test_a_change_of_the_machines_speed_meets_all_sizes():
    experience = Experience()
    for size, seconds in ((1, 2.0), (9, 6.0)):
        for _ in range(4):
            experience.add_time(1, size, seconds)
    for _ in range(100):
        experience.add_time(1, 1, 4.0)
    cost = experience.costs(1)
    assert cost(1) == pytest.approx(4.0, rel=0.01)
    assert cost(9) > 8.0


def test_experience_belongs_to_a_model():
    class Model:
        pass

    model, other = Model(), Model()
    make_pace(model, "auto")._experience.add_time(1, 1, 1.0)
    assert make_pace(model, "auto")._experience.knows(1, 1)
    assert not make_pace(other, "auto")._experience.knows(1, 1)
    assert make_pace(model, DEFAULT_BLOCK_SIZE).block_size(3, 99) == DEFAULT_BLOCK_SIZE
