"""From records to padded tensors."""

import pytest
import torch
from training_cases import BLOCK_SIZE, make_record, make_records

from cllm_hf.training.collator import TrajectoryCollator
from cllm_hf.training.states import cut_responses


def with_augmented(record, counts):
    """Further states, one list a block, told apart by their first token."""
    number_of_blocks = len(record["states"])
    lists = [[[100 + j] * BLOCK_SIZE for j in range(counts[b % len(counts)])] for b in range(number_of_blocks)]
    return {**record, "augmented_states": lists}


def same(batch, other):
    return batch.keys() == other.keys() and all(torch.equal(batch[name], other[name]) for name in batch)


def test_sequences_and_labels_are_padded_on_the_right():
    records = make_records()
    batch = TrajectoryCollator(BLOCK_SIZE)(records)
    longest = max(len(record["prompt_ids"] + record["response_ids"]) for record in records)
    assert batch["clean_ids"].shape == batch["clean_mask"].shape == batch["labels"].shape == (3, longest)
    for row, record in enumerate(records):
        prompt, response = record["prompt_ids"], record["response_ids"]
        padding = longest - len(prompt + response)
        assert batch["clean_ids"][row].tolist() == prompt + response + [0] * padding
        assert batch["clean_mask"][row].tolist() == [1] * len(prompt + response) + [0] * padding
        assert batch["labels"][row].tolist() == [-100] * len(prompt) + response + [-100] * padding
        assert batch["prompt_lengths"][row] == len(prompt) and batch["response_lengths"][row] == len(response)
    assert not {"label_ids"} & batch.keys()


def test_candidates_are_the_states_the_augmented_ones_and_the_fixed_point():
    records = [with_augmented(record, [2, 0, 1]) for record in make_records()]
    batch = TrajectoryCollator(BLOCK_SIZE)(records)
    assert batch["candidates"].shape == (3, 3, 3 + 2 + 1, BLOCK_SIZE) and batch["candidates"].dtype == torch.int32
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
            assert batch["candidates"][row, block].tolist() == expected
            assert batch["num_candidates"][row, block] == len(states)


def test_a_block_that_was_right_at_once_gives_its_fixed_point():
    record = make_record(4, 5)
    record["states"] = [[record["response_ids"]]]
    batch = TrajectoryCollator(BLOCK_SIZE)([record])
    assert batch["num_candidates"].tolist() == [[1]]
    assert batch["candidates"].tolist() == [[[record["response_ids"]] * 2]]
    augmented = TrajectoryCollator(BLOCK_SIZE)([with_augmented(record, [1])])
    assert augmented["num_candidates"].tolist() == [[1]]
    assert augmented["candidates"][0, 0].tolist() == [[100] * BLOCK_SIZE, record["response_ids"]]


def test_what_stands_behind_the_response_means_nothing():
    """States are padded there with whatever the tokenizer pads with."""
    batches = [
        TrajectoryCollator(BLOCK_SIZE)([make_record(6, 7, pad=pad), make_record(4, 11, pad=pad)]) for pad in (0, 9)
    ]
    assert same(*batches)


def test_augmented_states_are_left_out_where_they_are_not_wanted():
    records = make_records()
    plain = TrajectoryCollator(BLOCK_SIZE)(records)
    augmented = [with_augmented(record, [2]) for record in records]
    assert same(TrajectoryCollator(BLOCK_SIZE, with_augmented=False)(augmented), plain)
    assert not same(TrajectoryCollator(BLOCK_SIZE)(augmented), plain)
    for nothing in (lambda record: None, lambda record: [[] for _ in record["states"]]):
        assert same(TrajectoryCollator(BLOCK_SIZE)([{**r, "augmented_states": nothing(r)} for r in records]), plain)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda extra: extra[:-1], "`augmented_states` must have a list of states for each block, with 5 tokens"),
        (lambda extra: [[[1, 2, 3]], *extra[1:]], r"lengths \[3\] in record"),
        (lambda extra: [*extra, []], "`augmented_states` must have"),
    ],
)
def test_augmented_states_that_do_not_fit_are_refused(change, message):
    record = make_record(6, 7)
    record = {**record, "augmented_states": change([[] for _ in record["states"]])}
    with pytest.raises(ValueError, match=message):
        TrajectoryCollator(BLOCK_SIZE)([record])


@pytest.mark.parametrize("room", [5, 6, 9, 10, 12, 13, 99])
def test_long_responses_lose_their_last_blocks(room):
    record = with_augmented(make_record(6, 13), [1])
    batch = TrajectoryCollator(BLOCK_SIZE, max_length=6 + room)([record, make_record(3, 1)])
    kept = 13 if room >= 13 else room // BLOCK_SIZE * BLOCK_SIZE
    assert batch["response_lengths"].tolist() == [kept, 1]
    assert batch["clean_ids"][0, 6 : 6 + kept].tolist() == record["response_ids"][:kept]
    assert batch["candidates"].shape[1] == -(-kept // BLOCK_SIZE)
    alone = TrajectoryCollator(BLOCK_SIZE)(
        [
            {
                **record,
                "response_ids": record["response_ids"][:kept],
                "states": record["states"][: -(-kept // BLOCK_SIZE)],
                "augmented_states": record["augmented_states"][: -(-kept // BLOCK_SIZE)],
            }
        ]
    )
    assert torch.equal(batch["candidates"][0], alone["candidates"][0])
    assert torch.equal(batch["record_keys"][0], alone["record_keys"][0])


def test_a_prompt_that_leaves_no_room_is_refused():
    with pytest.raises(ValueError, match="prompt of 6 tokens leaves no room for a block of 5 in `max_length=10`"):
        TrajectoryCollator(BLOCK_SIZE, max_length=10)([make_record(6, 7)])
    with pytest.raises(ValueError, match="leaves no room for a block of 1"):
        TrajectoryCollator(BLOCK_SIZE, max_length=6, with_states=False)([make_record(6, 7)])


def test_without_states_a_record_is_a_prompt_and_a_response():
    record = {name: value for name, value in make_record(6, 13).items() if name != "states"}
    batch = TrajectoryCollator(BLOCK_SIZE, max_length=6 + 8, with_states=False)([record])
    assert not {"candidates", "num_candidates"} & batch.keys()
    assert batch["response_lengths"].tolist() == [8]  # no blocks to keep whole
    for name in ("prompt_ids", "response_ids"):
        with pytest.raises(ValueError, match=f"needs tokens in the column `{name}`, got none in record 0"):
            TrajectoryCollator(BLOCK_SIZE, with_states=False)([{**record, name: []}])


def test_ground_truth_answers():
    records = [{**make_record(6, 7), "label_ids": [4, 5, 6]}, {**make_record(3, 1), "label_ids": [7]}]
    assert TrajectoryCollator(BLOCK_SIZE, with_labels=True)(records)["label_ids"].tolist() == [
        [4, 5, 6],
        [7, -100, -100],
    ]
    longest = [{**records[0], "label_ids": list(range(4, 30))}, records[1]]
    cut = TrajectoryCollator(BLOCK_SIZE, max_length=12, with_labels=True)(longest)["label_ids"]
    assert cut.tolist() == [[4, 5, 6, 7, 8, 9], [7] + [-100] * 5]
    for missing in ([], None):
        with pytest.raises(ValueError, match="needs tokens in the column `label_ids`, got none in record 0"):
            TrajectoryCollator(BLOCK_SIZE, with_labels=True)([{**records[0], "label_ids": missing}])


def test_another_block_size_is_refused():
    with pytest.raises(ValueError, match="Every state must have `block_size` tokens, 16"):
        TrajectoryCollator(16)(make_records())
    assert TrajectoryCollator(None)(make_records())["candidates"].shape[-1] == BLOCK_SIZE


def test_keys_are_made_of_the_tokens_alone():
    records = make_records()
    keys = TrajectoryCollator(BLOCK_SIZE)(records)["record_keys"]
    assert len(set(keys.tolist())) == 3
    turned = TrajectoryCollator(BLOCK_SIZE, with_labels=True)(records[::-1])["record_keys"]
    assert turned.tolist() == keys.tolist()[::-1]
    alone = TrajectoryCollator(None, with_states=False)([{**records[0], "data_id": "another"}])["record_keys"]
    assert alone[0] == keys[0]
    other = {**records[0], "response_ids": records[0]["response_ids"][:-1] + [1]}
    assert TrajectoryCollator(None, with_states=False)([other])["record_keys"][0] != keys[0]


@pytest.mark.parametrize("length", [1, 7, 20])
def test_responses_are_cut_out_of_their_sequences(length):
    records = make_records()
    batch = TrajectoryCollator(BLOCK_SIZE)(records)
    cut = cut_responses(batch["clean_ids"], batch["prompt_lengths"], length)
    for row, record in zip(cut.tolist(), records):
        assert row == (record["response_ids"] + [0] * length)[:length]
