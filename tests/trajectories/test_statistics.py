"""Statistics of trajectories: what they count, by definition; that parts add up; how they are shown."""

import json
import math
import warnings
from collections import Counter

import numpy as np
import pytest
from datasets import Dataset, Features
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cllm_hf import TrajectoryStatistics, measure_trajectories
from cllm_hf.trajectories.schema import features
from cllm_hf.trajectories.statistics import format_histogram, format_statistics, plot_statistics


BLOCK_SIZE = 5


def slow_counts(trajectory, length):
    """Iterations, fast-forwarded and stationary tokens of a block, word by word as they are defined."""
    right = [[token == end for token, end in zip(state, trajectory[-1])][:length] for state in trajectory]
    leading = [next((i for i, is_right in enumerate(state) if not is_right), length) for state in right]
    fast_forwarded = sum(max(after - before - 1, 0) for before, after in zip(leading, leading[1:]))
    stationary = 0
    for position in range(length):
        stationary += any(
            state[position] and not all(state[:position]) and all(later[position] for later in right[number:])
            for number, state in enumerate(right)
        )
    return len(trajectory) - 1, fast_forwarded, stationary


def block_lengths(record):
    left = len(record["response_ids"])
    return [min(left - BLOCK_SIZE * number, BLOCK_SIZE) for number in range(len(record["states"]))]


@st.composite
def records(draw):
    """Any tokens at all, out of few, so that some are right by chance: not only what a model would do."""
    state = st.lists(st.integers(0, 2), min_size=BLOCK_SIZE, max_size=BLOCK_SIZE)
    blocks = draw(st.lists(st.lists(state, min_size=1, max_size=BLOCK_SIZE + 2), min_size=1, max_size=3))
    length = BLOCK_SIZE * len(blocks) - draw(st.integers(0, BLOCK_SIZE - 1))
    response = [token for block in blocks for token in block[-1]][:length]
    return {"prompt_ids": [1], "response_ids": response, "states": blocks, "is_greedy": draw(st.booleans())}


def random_records(count, seed=0):
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        blocks = [rng.integers(0, 3, (rng.integers(1, 7), BLOCK_SIZE)).tolist() for _ in range(rng.integers(1, 4))]
        length = BLOCK_SIZE * len(blocks) - int(rng.integers(BLOCK_SIZE))
        response = [token for block in blocks for token in block[-1]][:length]
        made.append(
            {
                "data_id": str(len(made)),
                "prompt": "",
                "response": "",
                "prompt_ids": [1],
                "response_ids": response,
                "states": blocks,
                "is_greedy": bool(rng.random() < 0.7),
            }
        )
    return made


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.lists(records(), min_size=1, max_size=4))
def test_counts_equal_the_definition(given_records):
    expected, left_out = [], []
    for record in given_records:
        for block, length in zip(record["states"], block_lengths(record)):
            if record["is_greedy"] or len(block) > 1:
                expected.append(slow_counts(block, length))
            else:
                left_out.append(length)
    statistics = measure_trajectories(given_records)
    assert statistics.iterations == Counter(iterations for iterations, _, _ in expected)
    assert statistics.fast_forwarded == Counter(tokens for _, tokens, _ in expected)
    assert statistics.stationary == Counter(tokens for _, _, tokens in expected)
    assert (statistics.num_left_out_blocks, statistics.num_left_out_tokens) == (len(left_out), sum(left_out))
    assert statistics.num_records == len(given_records) and statistics.num_blocks == len(expected)
    assert statistics.num_tokens == sum(len(record["response_ids"]) for record in given_records)


def test_a_block_by_hand():
    """0, 1, 3 and 5 leading tokens are right; the third and the fifth are so before those in front of them."""
    states = [[9, 9, 3, 9, 9], [1, 9, 3, 9, 5], [1, 2, 3, 9, 5], [1, 2, 3, 4, 5]]
    statistics = measure_trajectories([{"response_ids": [1, 2, 3, 4, 5], "states": [states]}])
    assert (statistics.mean_iterations, statistics.mean_fast_forwarded, statistics.mean_stationary) == (3, 2, 2)
    assert statistics.tokens_per_iteration == 5 / 3
    # The same with a response that ends in the block: nothing after its end counts.
    statistics = measure_trajectories([{"response_ids": [1, 2, 3], "states": [states]}])
    assert (statistics.mean_iterations, statistics.mean_fast_forwarded, statistics.mean_stationary) == (3, 1, 1)


def test_a_token_that_is_wrong_again_is_not_stationary():
    states = [[9, 2, 9], [9, 9, 3], [1, 2, 3]]
    assert measure_trajectories([{"response_ids": [1, 2, 3], "states": [states]}]).stationary == {1: 1}


def test_datasets_rows_and_parts_give_the_same():
    rows = random_records(1203)
    whole = measure_trajectories(rows)
    dataset = Dataset.from_list(rows, features=features())
    assert whole.num_left_out_blocks > 10 and len(whole.stationary) > 3
    assert measure_trajectories(iter(rows)) == whole
    assert measure_trajectories(dataset) == measure_trajectories(dataset.shuffle(seed=0)) == whole
    assert measure_trajectories(dataset.with_format("numpy")) == whole
    parts = [measure_trajectories(dataset.shard(7, index)) for index in range(7)]
    assert sum(parts, TrajectoryStatistics(BLOCK_SIZE)) == whole
    assert sum(reversed(parts), TrajectoryStatistics(BLOCK_SIZE)).to_dict() == whole.to_dict()
    assert measure_trajectories(dataset.select([]), BLOCK_SIZE) == TrajectoryStatistics(BLOCK_SIZE)


def test_records_without_is_greedy_are_greedy():
    rows = random_records(50)
    for row in rows:
        row["is_greedy"] = None
    expected = measure_trajectories([{**row, "is_greedy": True} for row in rows])
    assert expected.num_left_out_blocks == 0
    dataset = Dataset.from_list(rows, features=features())
    for same in (rows, dataset, dataset.remove_columns("is_greedy"), [{**row, "is_greedy": np.True_} for row in rows]):
        assert measure_trajectories(same) == expected
    left_out = measure_trajectories([{**row, "is_greedy": np.False_} for row in rows]).num_left_out_blocks
    assert left_out == expected.iterations[0] > 0


def test_json_keeps_everything_in_one_order():
    statistics = measure_trajectories(random_records(200))
    text = json.dumps(statistics.to_dict())
    again = TrajectoryStatistics.from_dict(json.loads(text))
    assert again == statistics and json.dumps(again.to_dict()) == text
    for name in ("iterations", "fast_forwarded", "stationary"):
        values = list(map(int, statistics.to_dict()[name]))
        assert values == sorted(values)


def test_means_without_blocks_are_not_numbers():
    empty = TrajectoryStatistics(BLOCK_SIZE)
    assert empty.num_blocks == 0
    for name in ("mean_iterations", "mean_fast_forwarded", "mean_stationary", "tokens_per_iteration"):
        assert math.isnan(getattr(empty, name))


def test_table_has_means_and_their_ratio():
    before = TrajectoryStatistics(4, 1, 8, iterations={4: 2}, fast_forwarded={0: 1, 1: 1}, stationary={0: 2})
    after = TrajectoryStatistics(4, 1, 8, iterations={1: 1, 3: 1}, fast_forwarded={1: 1, 2: 1}, stationary={2: 2})
    table = format_statistics({"before": before, "after": after})
    cells = {}
    for line in table.splitlines():
        title, *numbers = [cell.strip() for cell in line.strip("|").split("|")]
        cells[title] = numbers
    assert cells["block size 4"] == ["before", "after", "after / before"]
    assert cells["tokens"] == ["8", "8", ""]
    assert cells["iterations to converge a block"] == ["4.00", "2.00", "0.50x"]
    assert cells["tokens per iteration"] == ["1.00", "2.00", "2.00x"]
    assert cells["fast-forwarded tokens a block"] == ["0.50", "1.50", "3.00x"]
    assert cells["stationary tokens a block"] == ["0.00", "2.00", "-"]
    assert "after / before" not in format_statistics({"before": before, "after": after, "later": after})
    assert "nan" not in format_statistics({"before": before, "none": TrajectoryStatistics(4)})


@pytest.mark.parametrize("largest", [0, 3, 16, 19, 20, 128, 511])
def test_histogram_shows_every_block_in_at_most_100_columns(largest):
    rng = np.random.default_rng(largest)
    values = Counter({largest: 1_000_000, **{int(value): 1 for value in rng.integers(0, largest + 1, 30)}})
    values[largest] = 1_000_000
    text = format_histogram(TrajectoryStatistics(512, iterations=values, fast_forwarded=values, stationary=values))
    parts = text.split("\n\n")
    assert len(parts) == 3 and max(map(len, text.splitlines())) <= 100
    for part in parts:
        bars = [line.split() for line in part.splitlines()[1:]]
        assert 1 <= len(bars) <= 20
        assert sum(int(bar[1].replace(",", "")) for bar in bars) == sum(values.values())
        # What is there is seen, what is not is not.
        assert all((len(bar) == 4) == (bar[1] != "0") for bar in bars)
        lows, highs = zip(*((int(bar[0].split("-")[0]), int(bar[0].split("-")[-1])) for bar in bars))
        assert lows[0] == 0 and highs[-1] >= largest and all(a + 1 == b for a, b in zip(highs, lows[1:]))


def test_plot_is_a_picture_of_the_same_bytes_each_time(tmp_path):
    import matplotlib

    before, after = measure_trajectories(random_records(100)), measure_trajectories(random_records(100, seed=1))
    named = {"_before, $5 each": before, "after": after, "nothing": TrajectoryStatistics(BLOCK_SIZE)}
    path = tmp_path / "new folder" / "statistics.png"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_statistics(named, path)
    first = path.read_bytes()
    with Image.open(path) as picture:
        picture.load()
        assert picture.format == "PNG" and min(picture.size) > 400 and "Software" not in picture.info
        assert np.asarray(picture.convert("L")).std() > 10
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "black"}):
        plot_statistics(named, path)
        assert matplotlib.rcParams["font.size"] == 20
    assert path.read_bytes() == first and [file.name for file in path.parent.iterdir()] == [path.name]
    plot_statistics({"before": before}, path)
    assert path.read_bytes() != first


def test_different_block_sizes_are_refused(tmp_path):
    small, large = TrajectoryStatistics(4), TrajectoryStatistics(8)
    for combine in (
        lambda: small + large,
        lambda: format_statistics({"a": small, "b": large}),
        lambda: plot_statistics({"a": small, "b": large}, tmp_path / "a.png"),
    ):
        with pytest.raises(ValueError, match=r"`block_size` \[4, 8\]"):
            combine()
    with pytest.raises(TypeError):
        small + 1


def test_nothing_to_show_is_refused(tmp_path):
    for show in (format_statistics, lambda named: plot_statistics(named, tmp_path / "a.png")):
        with pytest.raises(ValueError, match="no statistics to show"):
            show({})
    with pytest.raises(ValueError, match="at least one block"):
        format_histogram(TrajectoryStatistics(4))
    with pytest.raises(ValueError, match="no records"):
        measure_trajectories([])
    with pytest.raises(OSError, match="output file"):
        plot_statistics({"a": TrajectoryStatistics(4)}, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"states": [[[1, 2]], [[3]]]}, r"got lengths \[1, 2\]"),
        ({"states": [[[1, 2]]]}, "Record 0 has 1 blocks .* response of 3 tokens takes 2 blocks of 2"),
        ({"states": [[[1, 2]], [[3, 0]], [[0, 0]]]}, "Record 0 has 3 blocks"),
        ({"states": [[[1, 2]], []]}, "at least one state"),
        ({"states": []}, "at least 1, got lengths"),
        ({"states": [[[]], [[]]]}, r"at least 1, got lengths \[0\]"),
    ],
)
def test_records_that_are_refused(change, message):
    record = {"prompt_ids": [1], "response_ids": [1, 2, 3], "states": [[[1, 2]], [[3, 0]]], **change}
    columns = Features({name: feature for name, feature in features().items() if name in record})
    for same in ([record], Dataset.from_list([record], features=columns)):
        with pytest.raises(ValueError, match=message):
            measure_trajectories(same)


def test_wrong_block_size_and_missing_columns_are_refused():
    rows = random_records(3)
    with pytest.raises(ValueError, match=r"`block_size` tokens, 16, got lengths \[5\]"):
        measure_trajectories(rows, 16)
    with pytest.raises(ValueError, match="States are needed here"):
        measure_trajectories([{"prompt_ids": [1], "response_ids": [1]}])
    with pytest.raises(ValueError, match="States are needed here"):
        measure_trajectories(Dataset.from_list(rows).remove_columns("states"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_size": 0}, "`block_size`.* 0"),
        ({"num_tokens": -1}, "`num_tokens`.* -1"),
        ({"iterations": {"-1": 1}}, "`iterations`"),
        ({"stationary": {"0": 2}}, "`stationary` .*1, 1, 2"),
        ({"extra": 0}, "entries block_size.*extra"),
    ],
)
def test_statistics_that_are_refused(change, message):
    good = TrajectoryStatistics(4, 1, 3, iterations={1: 1}, fast_forwarded={0: 1}, stationary={0: 1}).to_dict()
    with pytest.raises(ValueError, match=message):
        TrajectoryStatistics.from_dict({**good, **change})
