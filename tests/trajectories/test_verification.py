"""Verification finds what does not hold, and its draw is uniform over what there is."""

import copy
import random
from collections import Counter

import numpy as np
import pytest
import torch
from architectures import CANNOT_BUILD, MODEL_TYPES, make_architecture
from benchmarks.number_tokenizer import make_number_tokenizer
from conftest import make_model, make_word_model
from datasets import Dataset
from peft import IA3Config, get_peft_model

from cllm_hf import FEATURES, CleaningRules, TrajectoryBuilder
from cllm_hf.demo.problems import make_problems
from cllm_hf.trajectories import schema, verification
from cllm_hf.trajectories.verification import (
    VerificationReport,
    count_transitions,
    format_verification,
    verify_transitions,
)


BLOCK_SIZE = 5
NO_CLEANING = CleaningRules(max_token_run=None, max_sentence_repeats=None, drop_empty=False)
PROMPTS = [problem.prompt for problem in make_problems(12, seed=3)]


def build(model, tokenizer):
    options = {"block_size": BLOCK_SIZE, "max_new_tokens": 23, "cleaning": NO_CLEANING, "show_progress": False}
    return TrajectoryBuilder(model, tokenizer, **options).build(PROMPTS)


@pytest.fixture(scope="module")
def word_model(tokenizer):
    return make_word_model(tokenizer)


@pytest.fixture(scope="module")
def dataset(word_model, tokenizer):
    return build(word_model, tokenizer)


def transitions_of(records):
    """Slowly, as the docstring says."""
    found = []
    for number, record in enumerate(records):
        for block, states in enumerate(record["states"]):
            if len(states) > 1 or record.get("is_greedy", True):
                found += [(number, block, state) for state in range(len(states))]
    return found


def change(dataset, row, edit, **columns):
    """A copy of the dataset in which `edit` has changed the states of a row."""
    records = dataset.to_list()
    edit(records[row]["states"])
    for name, values in columns.items():
        for record, value in zip(records, values):
            record[name] = value
    return Dataset.from_list(records)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "gemma3", "mixtral"])
def test_real_trajectories_hold(name, tokenizer):
    model = make_word_model(tokenizer, name)
    dataset = build(model, tokenizer)
    report = verify_transitions(model, dataset, count=90)
    assert report == VerificationReport(len(transitions_of(dataset)), 90, 90, 0)
    assert report.num_held == 90 and len(report.near_ties) == 0


# These count positions from elsewhere where they are given none.
@pytest.mark.parametrize("name", ["roberta", "xlm-roberta", "data2vec-text", "bert", "opt"])
def test_transitions_hold_at_the_positions_that_generate_passes(name):
    model = make_architecture(name)
    ids = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(0)).tolist()
    options = {"block_size": BLOCK_SIZE, "max_new_tokens": 12, "cleaning": NO_CLEANING, "show_progress": False}
    dataset = TrajectoryBuilder(model, make_number_tokenizer(60), **options).build(ids)
    for prompt, record in zip(ids, dataset):
        greedy = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12)[0, len(prompt) :]
        assert record["response_ids"] == greedy[: len(record["response_ids"])].tolist()
    adapted = get_peft_model(copy.deepcopy(model), IA3Config(target_modules="all-linear", feedforward_modules=[]))
    for one in (model, adapted):
        report = verify_transitions(one, dataset)
        assert report.num_held == report.num_checked == report.num_transitions > 5


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MODEL_TYPES if name not in CANNOT_BUILD])
def test_transitions_of_every_architecture_hold_or_it_is_refused(name):
    model = make_architecture(name)
    ids = torch.randint(3, 60, (3, 7), generator=torch.Generator().manual_seed(1)).tolist()
    options = {"block_size": BLOCK_SIZE, "max_new_tokens": 12, "cleaning": NO_CLEANING, "show_progress": False}
    try:
        builder = TrajectoryBuilder(model, make_number_tokenizer(60), **options)
    except ValueError as error:
        assert "Packed forward" in str(error) or "cannot be packed" in str(error)
        return
    report = verify_transitions(model, builder.build(ids))
    assert all(failure.is_near_tie for failure in report.failures) and report.num_held >= report.num_checked - 1


def test_every_transition_is_counted_and_recomputed(word_model, dataset, monkeypatch):
    expected = transitions_of(dataset)
    per_record, block_size = count_transitions(dataset)
    counts = Counter(row for row, _, _ in expected)
    assert block_size == BLOCK_SIZE and per_record.tolist() == [counts[row] for row in range(len(dataset))]
    fed = []
    handle = word_model.register_forward_pre_hook(
        lambda module, args, kwargs: fed.append((args[0][0].tolist(), sorted(kwargs))), with_kwargs=True
    )
    report = verify_transitions(word_model, dataset, count=10**6)
    handle.remove()
    assert report.num_checked == report.num_transitions == report.num_held == len(expected)
    inputs = []
    for row, block, state in expected:
        record = dataset[row]
        before = record["prompt_ids"] + record["response_ids"][: block * BLOCK_SIZE]
        inputs.append((before + record["states"][block][state][:-1], ["position_ids", "use_cache"]))
    assert fed == inputs
    # Neither the number of rows that are read at once nor their order changes what is counted.
    monkeypatch.setattr(schema, "_ROWS_AT_ONCE", 5)
    order = list(range(len(dataset)))[::-1]
    assert count_transitions(dataset.select(order))[0].tolist() == per_record[::-1].tolist()


def test_draws_repeat_with_the_seed_and_cover_all_transitions_alike(dataset, monkeypatch):
    seen = Counter()

    def look(model, record, row, numbers, block_size):
        seen.update((row, number) for number in numbers)
        return []

    monkeypatch.setattr(verification, "_check_record", look)
    model = torch.nn.Linear(1, 1)
    verify_transitions(model, dataset, count=50, seed=3)
    first = set(seen)
    assert max(seen.values()) == 1 and len(seen) == 50
    verify_transitions(model, dataset, count=50, seed=3)
    assert set(seen) == first
    seen.clear()
    total = len(transitions_of(dataset))
    for seed in range(200):
        verify_transitions(model, dataset, count=total // 4, seed=seed)
    assert len(seen) == total
    # Each is drawn about 50 times; 25 is four standard deviations away, and 5 more for their number.
    assert 20 < min(seen.values()) and max(seen.values()) < 80


def test_a_corrupted_transition_is_found_and_named(word_model, dataset):
    row, block = next((row, block) for row, block, state in transitions_of(dataset) if block > 0 and state == 3)
    right = dataset[row]["states"][block][2]
    wrong = (right[3] + 1) % 20

    def corrupt(states):
        states[block][2][3] = wrong

    report = verify_transitions(word_model, change(dataset, row, corrupt), count=10**6)
    into = report.failures[0]
    assert (into.data_id, into.block, into.state, into.position) == (dataset[row]["data_id"], block, 1, 3)
    assert (into.expected, into.got) == (wrong, right[3]) and not into.is_near_tie
    record = dataset[row]
    fed = record["prompt_ids"] + record["response_ids"][: block * BLOCK_SIZE] + record["states"][block][1][:-1]
    with torch.no_grad():
        logits = word_model(torch.tensor([fed])).logits[0, -2]
    assert into.gap == pytest.approx((logits[right[3]] - logits[wrong]).item())
    # The transition out of it may differ too, and nothing else.
    assert {(failure.block, failure.state) for failure in report.failures} <= {(block, 1), (block, 2)}
    assert report.num_held == report.num_checked - len(report.failures)
    text = format_verification(report)
    assert f"{report.num_held} hold, {len(report.failures)} do not" in text
    assert [cell.strip() for cell in text.splitlines()[4].split("|")[1:7]] == [
        *(dataset[row]["data_id"], str(block), "1", "3", str(wrong), str(right[3]))
    ]


def test_another_model_does_not_hold(tokenizer, dataset):
    other = make_model("llama", seed=1, vocab_size=len(tokenizer)).train()
    report = verify_transitions(other, dataset, count=200)
    assert len(report.failures) > 100 and other.training
    text = format_verification(report)
    assert f"And {len(report.failures) - 20} more." in text and text.count("\n| ") == 21


def test_padding_behind_the_end_is_not_compared(word_model, dataset):
    row = next(row for row, record in enumerate(dataset) if len(record["response_ids"]) % BLOCK_SIZE)
    length = len(dataset[row]["response_ids"]) % BLOCK_SIZE

    def scribble(states):
        for state in states[-1]:
            state[length:] = random.Random(0).choices(range(20), k=BLOCK_SIZE - length)

    assert not verify_transitions(word_model, change(dataset, row, scribble), count=10**6).failures


def test_single_states_of_responses_that_are_not_greedy_are_left_out(word_model, dataset):
    def depart(states):
        states[0] = [[5] * BLOCK_SIZE]

    is_greedy = [row != 2 for row in range(len(dataset))]
    changed = change(dataset, 2, depart, is_greedy=is_greedy)
    kept = count_transitions(changed)[0]
    assert kept[2] == count_transitions(dataset)[0][2] - len(dataset[2]["states"][0])
    assert kept.sum() == len(transitions_of(changed))
    # Its other blocks still continue the response that it had, and hold.
    report = verify_transitions(word_model, changed, count=10**6)
    assert report.num_checked == kept.sum() and not report.failures
    single = {"prompt_ids": [1], "response_ids": [3, 4], "states": [[[3, 4]]], "is_greedy": False}
    with pytest.raises(ValueError, match="must have transitions to check, got none in its 1 records"):
        verify_transitions(word_model, Dataset.from_list([single]))


def test_near_ties_are_told_from_errors():
    logits = torch.tensor([[0.0, 9.0, 9.00001], [0.0, 1.0, 2.0], [5.0, 5.0, 0.0]])
    near = verification._difference(("0", 0, 0), logits[:1], torch.tensor([1]), torch.float32)
    assert near.is_near_tie and (near.expected, near.got) == (1, 2)
    far = verification._difference(("0", 0, 0), logits[:2], torch.tensor([1, 1]), torch.float32)
    assert not far.is_near_tie and (far.position, far.gap) == (1, 1.0)
    exact = verification._difference(("0", 0, 0), logits, torch.tensor([2, 2, 1]), torch.float64)
    assert exact.is_near_tie and (exact.position, exact.gap) == (2, 0.0)
    report = VerificationReport(10, 10, 10, 0, [far], [near])
    assert len(report.near_ties) == 1 and report.num_held == 9
    assert "9 hold, 1 do not. One of those that hold does so up to near ties" in format_verification(report)


def test_fewer_transitions_than_asked_for_are_said_so():
    assert format_verification(VerificationReport(90, 5, 5, 3)).startswith("5 of 90 transitions, drawn at random with")
    assert "All 4 transitions (there are fewer than the 5 asked for) were" in format_verification(
        VerificationReport(4, 5, 4, 0)
    )
    assert format_verification(VerificationReport(5, 5, 5, 0)).startswith("All 5 transitions were recomputed")


RECORD = {"data_id": "7", "prompt_ids": [1, 2], "response_ids": [3, 4, 5], "states": [[[1, 1], [3, 4]], [[5, 0]]]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"response_ids": [3, 4, 60]}, "vocabulary of 60, got 60 in record 7. Pass the model"),
        ({"states": [[[-1, 1], [3, 4]], [[5, 0]]]}, "vocabulary of 60, got -1 in record 7"),
        ({"states": [[[1, 1], [3]], [[5, 0]]]}, r"`block_size` tokens, 1, got lengths \[1, 2\]"),
        ({"states": [[[1, 1], [3, 4]]]}, "Record 0 has 1 blocks .* of 3 tokens"),
        ({"states": []}, "at least 1, got lengths"),
    ],
)
def test_records_that_are_refused(changes, message):
    model = make_model("llama")
    with pytest.raises(ValueError, match=message):
        verify_transitions(model, Dataset.from_list([{**RECORD, **changes}], features=_features()))


def test_datasets_that_are_refused():
    model, dataset = make_model("llama"), Dataset.from_list([RECORD])
    with pytest.raises(ValueError, match="`count` must be at least 1, got 0"):
        verify_transitions(model, dataset, count=0)
    with pytest.raises(ValueError, match="States are needed here, got .*data_id, prompt_ids, response_ids. Collect"):
        verify_transitions(model, dataset.remove_columns("states"))
    with pytest.raises(ValueError, match="got none in its 0 records"):
        verify_transitions(model, dataset.select([]))


def test_counting_reads_large_datasets_in_parts():
    """100,000 records are counted without a Python object for each state."""
    states = [[[7] * BLOCK_SIZE] * 3] * 4
    row = {"prompt_ids": [1], "response_ids": [7] * 20, "states": states}
    dataset = Dataset.from_list([row], features=_features(row)).select(np.zeros(100_000, dtype=np.int64))
    per_record, _ = count_transitions(dataset)
    assert len(per_record) == 100_000 and set(per_record.tolist()) == {12}


def _features(record=RECORD):
    from datasets import Features

    return Features({name: FEATURES[name] for name in record})
