"""From records to padded tensors."""

import copy

import pytest
import torch
from conftest import VOCAB_SIZE
from training_cases import BLOCK_SIZE, make_record, make_records

from cllm_hf.training.batch import TrainingBatch, TrajectoryCollator


def with_augmented(record, counts):
    """Further states, one list a block, told apart by their first token."""
    number_of_blocks = len(record["states"])
    lists = [[[100 + j] * BLOCK_SIZE for j in range(counts[b % len(counts)])] for b in range(number_of_blocks)]
    return {**record, "augmented_states": lists}


def collate(records):
    return TrajectoryCollator(BLOCK_SIZE).collate(records)


def same(batch, other):
    batch, other = batch.columns(), other.columns()
    return batch.keys() == other.keys() and all(torch.equal(batch[name], other[name]) for name in batch)


def test_sequences_and_responses_are_padded_on_the_right():
    records = make_records()
    batch = collate(records)
    longest = max(len(record["prompt_ids"] + record["response_ids"]) for record in records)
    longest_response = max(len(record["response_ids"]) for record in records)
    assert batch.clean_ids.shape == batch.clean_mask.shape == (3, longest)
    assert batch.response_ids.shape == (3, longest_response) and len(batch) == 3
    for row, record in enumerate(records):
        prompt, response = record["prompt_ids"], record["response_ids"]
        padding = longest - len(prompt + response)
        assert batch.clean_ids[row].tolist() == prompt + response + [0] * padding
        assert batch.clean_mask[row].tolist() == [1] * len(prompt + response) + [0] * padding
        assert batch.response_ids[row].tolist() == response + [0] * (longest_response - len(response))
        assert batch.prompt_lengths[row] == len(prompt) and batch.response_lengths[row] == len(response)
    assert batch.label_ids is None and batch.label_lengths is None


@pytest.mark.parametrize("token", [60, -1, 2**31, -(2**40)])
@pytest.mark.parametrize("column", ["prompt_ids", "response_ids", "states", "augmented_states", "label_ids"])
def test_tokens_outside_of_the_vocabulary_are_refused_where_they_are_used(column, token):
    record = copy.deepcopy(with_augmented(make_record(6, 7), [1]))
    record["augmented_states"] = [[[5] * BLOCK_SIZE], [[5, 5, 999, -100, 2**40]]]  # two in the response, then padding
    collator = TrajectoryCollator(BLOCK_SIZE, with_labels=True)
    record["augmented_states"][1][0][-1] = -7
    collator.vocab_size = VOCAB_SIZE
    collator([record])
    if column == "prompt_ids":
        record[column][2] = token
    elif column == "response_ids":
        record[column][6] = token
        for state in record["states"][1]:
            state[1] = token
    elif column == "label_ids":
        record[column][0] = token
    else:
        record[column][1][0][1] = token
    with pytest.raises(ValueError, match=f"60.*{token} in `{column}` of record 0"):
        collator([make_record(3, 4), record])
    unused = {"with_states": column not in ("states", "augmented_states"), "with_labels": column != "label_ids"}
    other = TrajectoryCollator(BLOCK_SIZE, **unused)
    other.vocab_size = VOCAB_SIZE
    if column in ("states", "augmented_states", "label_ids"):
        other([record])


def test_candidates_are_the_states_the_augmented_ones_and_the_fixed_point():
    records = [with_augmented(record, [2, 0, 1]) for record in make_records()]
    batch = collate(records)
    assert batch.candidates.shape == (3, 3, 3 + 2 + 1, BLOCK_SIZE) and batch.candidates.dtype == torch.int32
    for row, record in enumerate(records):
        response = record["response_ids"]
        for block in range(3):
            fixed_point = response[block * BLOCK_SIZE : (block + 1) * BLOCK_SIZE]
            fixed_point += [0] * (BLOCK_SIZE - len(fixed_point))
            states = []
            if block < len(record["states"]):
                length = len(response) - block * BLOCK_SIZE
                states = record["states"][block][:-1] + record["augmented_states"][block]
                states = [[t if i < length else 0 for i, t in enumerate(state)] for state in states]
            expected = states + [fixed_point] * (6 - len(states))
            assert batch.candidates[row, block].tolist() == expected
            assert batch.num_candidates[row, block] == len(states)


def test_a_block_that_was_right_at_once_gives_its_fixed_point():
    record = make_record(4, 5)
    record["states"] = [[record["response_ids"]]]
    batch = collate([record])
    assert batch.num_candidates.tolist() == [[1]]
    assert batch.candidates.tolist() == [[[record["response_ids"]] * 2]]
    augmented = collate([with_augmented(record, [1])])
    assert augmented.num_candidates.tolist() == [[1]]
    assert augmented.candidates[0, 0].tolist() == [[100] * BLOCK_SIZE, record["response_ids"]]


def test_what_stands_behind_the_response_means_nothing():
    """States are padded there with whatever the tokenizer pads with."""
    batches = [collate([make_record(6, 7, pad=pad), make_record(4, 11, pad=pad)]) for pad in (0, 9)]
    assert same(*batches)


def test_augmented_states_are_left_out_where_they_are_not_wanted():
    records = make_records()
    plain = collate(records)
    augmented = [with_augmented(record, [2]) for record in records]
    assert same(TrajectoryCollator(BLOCK_SIZE, with_augmented=False).collate(augmented), plain)
    assert not same(collate(augmented), plain)
    for nothing in (lambda record: None, lambda record: [[] for _ in record["states"]]):
        assert same(collate([{**r, "augmented_states": nothing(r)} for r in records]), plain)


@pytest.mark.parametrize(
    "change", [lambda extra: extra[:-1], lambda extra: [[[1, 2, 3]], *extra[1:]], lambda extra: [*extra, []]]
)
def test_augmented_states_that_do_not_fit_are_refused(change):
    record = make_record(6, 7)
    record = {**record, "augmented_states": change([[] for _ in record["states"]])}
    with pytest.raises(ValueError, match="`augmented_states`"):
        collate([record])


@pytest.mark.parametrize("room", [5, 6, 9, 10, 12, 13, 99])
def test_long_responses_lose_their_last_blocks(room):
    record = with_augmented(make_record(6, 13), [1])
    batch = TrajectoryCollator(BLOCK_SIZE, max_length=6 + room).collate([record, make_record(3, 1)])
    kept = 13 if room >= 13 else room // BLOCK_SIZE * BLOCK_SIZE
    assert batch.response_lengths.tolist() == [kept, 1]
    assert batch.clean_ids[0, 6 : 6 + kept].tolist() == record["response_ids"][:kept]
    assert batch.candidates.shape[1] == -(-kept // BLOCK_SIZE)
    alone = collate(
        [
            {
                **record,
                "response_ids": record["response_ids"][:kept],
                "states": record["states"][: -(-kept // BLOCK_SIZE)],
                "augmented_states": record["augmented_states"][: -(-kept // BLOCK_SIZE)],
            }
        ]
    )
    assert torch.equal(batch.candidates[0], alone.candidates[0])
    assert torch.equal(batch.record_keys[0], alone.record_keys[0])


def test_a_prompt_that_leaves_no_room_is_refused():
    with pytest.raises(ValueError, match="`max_length=10`"):
        TrajectoryCollator(BLOCK_SIZE, max_length=10).collate([make_record(6, 7)])
    with pytest.raises(ValueError, match="`max_length=6`"):
        TrajectoryCollator(BLOCK_SIZE, max_length=6, with_states=False).collate([make_record(6, 7)])


def test_without_states_a_record_is_a_prompt_and_a_response():
    record = {name: value for name, value in make_record(6, 13).items() if name != "states"}
    batch = TrajectoryCollator(BLOCK_SIZE, max_length=6 + 8, with_states=False).collate([record])
    assert batch.candidates is None and batch.num_candidates is None
    assert batch.response_lengths.tolist() == [8]  # no blocks to keep whole
    for name in ("prompt_ids", "response_ids"):
        with pytest.raises(ValueError, match=f"`{name}`.*record 0"):
            TrajectoryCollator(BLOCK_SIZE, with_states=False).collate([{**record, name: []}])


def test_ground_truth_answers():
    records = [{**make_record(6, 7), "label_ids": [4, 5, 6]}, {**make_record(3, 1), "label_ids": [7]}]
    batch = TrajectoryCollator(BLOCK_SIZE, with_labels=True).collate(records)
    assert batch.label_ids.tolist() == [[4, 5, 6], [7, 0, 0]] and batch.label_lengths.tolist() == [3, 1]
    longest = [{**records[0], "label_ids": list(range(4, 30))}, records[1]]
    cut = TrajectoryCollator(BLOCK_SIZE, max_length=12, with_labels=True).collate(longest)
    assert cut.label_ids.tolist() == [[4, 5, 6, 7, 8, 9], [7] + [0] * 5] and cut.label_lengths.tolist() == [6, 1]
    for missing in ([], None):
        with pytest.raises(ValueError, match="`label_ids`.*record 0"):
            TrajectoryCollator(BLOCK_SIZE, with_labels=True).collate([{**records[0], "label_ids": missing}])


def test_another_block_size_is_refused():
    with pytest.raises(ValueError, match="`block_size`"):
        TrajectoryCollator(16).collate(make_records())
    assert TrajectoryCollator(None).collate(make_records()).candidates.shape[-1] == BLOCK_SIZE


def test_keys_are_made_of_the_tokens_alone():
    records = make_records()
    keys = collate(records).record_keys
    assert len(set(keys.tolist())) == 3
    turned = TrajectoryCollator(BLOCK_SIZE, with_labels=True).collate(records[::-1]).record_keys
    assert turned.tolist() == keys.tolist()[::-1]
    alone = TrajectoryCollator(None, with_states=False).collate([{**records[0], "data_id": "another"}]).record_keys
    assert alone[0] == keys[0]
    other = {**records[0], "response_ids": records[0]["response_ids"][:-1] + [1]}
    assert TrajectoryCollator(None, with_states=False).collate([other]).record_keys[0] != keys[0]


@pytest.mark.parametrize("with_all", [False, True])
def test_a_batch_is_rebuilt_from_its_columns(with_all):
    """Data loaders move, slice and join a batch as a dictionary of tensors."""
    collator = TrajectoryCollator(BLOCK_SIZE, with_states=with_all, with_labels=with_all)
    columns = collator(make_records())
    assert type(columns) is dict and all(type(values) is torch.Tensor for values in columns.values())
    assert len(columns) == 6 + 4 * with_all
    assert same(TrainingBatch(**columns), collator.collate(make_records()))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_first_rows_hold_the_first_records(count):
    collator = TrajectoryCollator(BLOCK_SIZE, with_labels=True)
    batch, alone = collator.collate(make_records()), collator.collate(make_records()[:count])
    rows = batch.first_rows(count)
    assert len(rows) == count and rows.columns().keys() == batch.columns().keys()
    for name, values in alone.columns().items():  # with no more padding than they need
        kept = getattr(rows, name)[tuple(slice(length) for length in values.shape)]
        assert torch.equal(kept, values), name


def test_positions_of_places_in_the_responses():
    records = make_records()
    batch = collate(records)
    anchors = batch.anchors(torch.tensor([[0, 3], [0, 0], [12, 1]]))
    for row, offset in ((0, 0), (0, 3), (1, 0), (2, 12)):
        place = int(anchors[row, [0, 3].index(offset) if row == 0 else 0])
        sequence = records[row]["prompt_ids"] + records[row]["response_ids"]
        assert sequence[place + 1] == records[row]["response_ids"][offset]
    assert batch.last_positions.tolist() == [
        len(record["prompt_ids"] + record["response_ids"]) - 1 for record in records
    ]
