"""Trajectories: every transition holds, every block ends in the response, bad datasets are refused."""

import random
import re

import pytest
import torch
from conftest import CONFIGS, make_model, make_word_model
from datasets import Dataset, load_dataset, load_from_disk

from cllm_hf import FEATURES, CleaningRules, TrajectoryBuilder, measure_trajectories
from cllm_hf.blocks.layout import num_blocks
from cllm_hf.demo.problems import make_problems
from cllm_hf.trajectories import shard
from cllm_hf.trajectories.collector import draw_first_states
from cllm_hf.trajectories.schema import check_dataset, check_record
from cllm_hf.trajectories.shard import ShardCollector


BLOCK_SIZE = 5
# These models repeat themselves.
PLAIN = {
    "max_tokens_per_batch": 300,
    "cleaning": CleaningRules(max_token_run=None, max_sentence_repeats=None, drop_empty=False),
    "drop_duplicates": False,
}


def build(model, tokenizer, prompts, **options):
    options = {"block_size": BLOCK_SIZE, "max_new_tokens": 23, "show_progress": False, **PLAIN, **options}
    builder = TrajectoryBuilder(model, processing_class=tokenizer, **options)
    return builder.build(prompts), builder


@pytest.fixture(scope="module")
def prompts():
    # Of different lengths, so that batches are padded.
    return [problem.prompt for problem in make_problems(30, seed=3)] + ["Mia", "Ben has 3 apples ."]


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_every_transition_is_the_argmax_of_a_plain_forward(name, tokenizer, prompts):
    """An independent recomputation: unpacked, one block, no cache, no mask."""
    model = make_word_model(tokenizer, name)
    dataset, builder = build(model, tokenizer, prompts)
    assert builder.counts["kept"] == len(dataset) >= len(prompts) - 1
    transitions = [
        (record, number, step)
        for record in dataset
        for number, trajectory in enumerate(record["states"])
        for step in range(len(trajectory))
    ]
    for record, number, step in random.Random(0).sample(transitions, 200):
        trajectory, start = record["states"][number], number * BLOCK_SIZE
        before = record["prompt_ids"] + record["response_ids"][:start]
        logits = model(torch.tensor([before + trajectory[step][:-1]])).logits[0, len(before) - 1 :]
        length = min(BLOCK_SIZE, len(record["response_ids"]) - start)
        # The fixed point is stored once: the transition after it leads to itself.
        following = trajectory[min(step + 1, len(trajectory) - 1)]
        assert logits.argmax(-1)[:length].tolist() == following[:length]
        assert following[length:] == [tokenizer.pad_token_id] * (BLOCK_SIZE - length)


def test_responses_are_greedy_and_blocks_end_in_them(word_model, tokenizer, prompts):
    dataset, _ = build(word_model, tokenizer, prompts)
    lengths = set()
    for record in dataset:
        ids = torch.tensor([record["prompt_ids"]])
        greedy = word_model.generate(ids, do_sample=False, max_new_tokens=23)[0, ids.shape[1] :].tolist()
        assert record["response_ids"] == greedy
        both = tokenizer.decode(record["prompt_ids"] + greedy, skip_special_tokens=True)
        assert record["prompt"] + record["response"] == both
        assert [token for block in record["states"] for token in block[-1]][: len(greedy)] == greedy
        lengths.add(len(greedy))
        for block in record["states"]:
            assert len(block) <= BLOCK_SIZE + 1
            assert all(a != b for a, b in zip(block, block[1:]))
    assert len(lengths) > 1, "some responses must end early for this test to say something"


def test_first_drafts_come_from_the_prompt_and_repeat_with_the_seed(word_model, tokenizer, prompts):
    first, _ = build(word_model, tokenizer, prompts, seed=1)
    for record in first:
        drawn = [token for block in record["states"] for token in block[0]][: len(record["response_ids"])]
        assert set(drawn) <= set(record["prompt_ids"])
    same, _ = build(word_model, tokenizer, prompts, seed=1, max_tokens_per_batch=90)
    other, _ = build(word_model, tokenizer, prompts, seed=2)
    assert first[:] == same[:]
    assert first[:] != other[:]


def test_draw_first_states_pads_behind_the_response():
    states = draw_first_states([7, 8], 7, 5, pad_id=0, seed=(0, 0))
    assert states.shape == (2, 5)
    assert set(states.flatten()[:7].tolist()) <= {7, 8} and states[1, 2:].tolist() == [0, 0, 0]


def test_one_state_where_the_first_draft_is_right(llama, byte_tokenizer):
    """A model that repeats the only token of the prompt needs no iteration at all."""
    model = make_model("llama", vocab_size=len(byte_tokenizer))

    def repeat(module, inputs, output):
        output.logits = torch.nn.functional.one_hot(torch.full_like(output.logits[..., 0], 66).long(), 258).float()
        return output

    model.register_forward_hook(repeat)
    dataset, _ = build(model, byte_tokenizer, [byte_tokenizer.decode([66])], max_new_tokens=10)
    assert dataset[0]["states"] == [[[66] * 5]] * 2


def test_chat_messages_use_the_chat_template(word_model, tokenizer):
    messages = "{% for message in messages %}{{ message['content'] }} . {% endfor %}"
    tokenizer.chat_template = messages + "{% if add_generation_prompt %}The answer is {% endif %}"
    try:
        dataset, _ = build(word_model, tokenizer, [[{"role": "user", "content": "Mia has 7"}]])
    finally:
        tokenizer.chat_template = None
    assert dataset[0]["prompt"] == "Mia has 7 . The answer is "
    assert dataset[0]["prompt_ids"] == tokenizer("Mia has 7 . The answer is")["input_ids"]


def test_generation_defaults_of_the_model_do_not_bend_the_responses(word_model, tokenizer, prompts):
    expected, _ = build(word_model, tokenizer, prompts)
    word_model.generation_config.update(do_sample=True, repetition_penalty=2.0)
    bent, builder = build(word_model, tokenizer, prompts)
    assert builder.counts["not_greedy"] == 0 and bent[:] == expected[:]
    assert word_model.generation_config.repetition_penalty == 2.0


def test_responses_that_blocks_do_not_end_in_are_dropped_and_counted(word_model, tokenizer, prompts, monkeypatch):
    decode = ShardCollector._decode

    def misremember(self, prompts, say):
        responses = decode(self, prompts, say)
        responses[0][-1] = (responses[0][-1] + 1) % len(tokenizer)
        return responses

    monkeypatch.setattr(ShardCollector, "_decode", misremember)
    monkeypatch.setattr(shard, "_PROMPTS_AT_ONCE", 5)
    dataset, builder = build(word_model, tokenizer, prompts)
    dropped = builder.counts["not_greedy"]
    assert dropped >= 2 and len(dataset) == builder.counts["kept"] == len(prompts) - dropped
    with pytest.raises(ValueError, match="No record is left of 1 prompts: 1 for `not_greedy`"):
        build(word_model, tokenizer, prompts[:1])


def test_peft_model_collects_with_its_adapter(word_model, tokenizer, prompts):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(word_model, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    dataset, builder = build(model, tokenizer, prompts)
    assert builder.counts["kept"] == len(prompts)
    ids = torch.tensor([dataset[0]["prompt_ids"]])
    greedy = model.eval().generate(input_ids=ids, do_sample=False, max_new_tokens=23)[0, ids.shape[1] :].tolist()
    assert dataset[0]["response_ids"] == greedy


def test_round_trips_keep_the_schema(word_model, tokenizer, prompts, tmp_path):
    dataset, _ = build(word_model, tokenizer, prompts)
    assert dataset.features == FEATURES
    dataset.save_to_disk(str(tmp_path / "disk"))
    dataset.to_parquet(str(tmp_path / "data.parquet"))
    from_disk = load_from_disk(str(tmp_path / "disk"))
    from_parquet = load_dataset(
        "parquet", data_files=str(tmp_path / "data.parquet"), split="train", cache_dir=str(tmp_path / "cache")
    )
    for loaded in (from_disk, from_parquet):
        assert loaded.features == FEATURES
        assert loaded[:] == dataset[:]
        assert check_dataset(loaded) == BLOCK_SIZE


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 0}, "`block_size`"),
        ({"max_new_tokens": 0}, "`max_new_tokens`"),
        ({"max_tokens_per_batch": 0}, "`max_tokens_per_batch`"),
        ({"prompts_per_shard": True}, "`prompts_per_shard`"),
        ({"seed": -1}, "`seed`"),
        ({"augment": 1}, "`augment`"),
        ({"test_fraction": 1.0}, "`test_fraction`"),
        ({"test_fraction": "0.1"}, "`test_fraction`"),
        ({"cleaning": {}}, "`cleaning`"),
        ({"not_greedy": "maybe"}, "`not_greedy`"),
        ({"max_new_tokens": 300}, "1 for `long_prompt` were dropped"),
    ],
)
def test_options_that_are_refused(word_model, tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        build(word_model, tokenizer, ["Mia has 7"], **options)


def test_prompts_that_are_refused(word_model, tokenizer):
    with pytest.raises(ValueError, match="at least one prompt"):
        build(word_model, tokenizer, [])
    with pytest.raises(ValueError, match="must be a list of prompts, got 'Mia'"):
        build(word_model, tokenizer, "Mia")
    with pytest.raises(ValueError, match="list of token ids, got {'question': 'Mia'}"):
        build(word_model, tokenizer, [{"question": "Mia"}])


RECORD = {"prompt_ids": [1, 2], "response_ids": [3, 4, 5], "states": [[[1, 1], [3, 4]], [[2, 0], [5, 0]]]}


def test_check_record_accepts_a_record():
    assert check_record(RECORD) == check_record(RECORD, 2) == 2
    assert [num_blocks(length, 4) for length in (1, 4, 5, 8)] == [1, 1, 2, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"states": [[[1, 1], [3]], [[5, 0]]]}, "`block_size`"),
        ({"states": [[[1, 1, 1], [3, 4, 1]]]}, r"2, got lengths \[3\]"),
        ({"states": [[[1, 1], [3, 4]]]}, "1 blocks .* 3 tokens takes 2"),
        ({"states": [[[3, 4]], []]}, "each with at least one state"),
        ({"states": []}, "block_size"),
        ({"states": [[[1, 1], [3, 4]], [[2, 0], [6, 0]]]}, "record .* response"),
        ({"response_ids": []}, "`response_ids`"),
    ],
)
def test_check_record_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        check_record({**RECORD, **change}, 2)


@pytest.mark.parametrize(
    "change",
    [
        {"states": [[[1, 1], [3]], [[5, 0]]]},
        {"states": [[[1, 1], [3, 4]]]},
        {"states": [[[3, 4]], []]},
        {"states": [[[3, 4, 5]], [[5, 0, 0]]]},
    ],
)
def test_records_at_once_are_checked_as_single_ones_are(change):
    """One rule for shapes, whether records are read to train, to measure or to verify; 500 are measured at once."""
    bad = {**RECORD, **change, "data_id": "700"}
    with pytest.raises(ValueError) as error:
        check_record(bad, 2)
    with pytest.raises(ValueError, match=re.escape(str(error.value))):
        measure_trajectories([*[RECORD] * 700, bad], 2)


def test_check_dataset_names_missing_columns():
    dataset = Dataset.from_list([RECORD]).remove_columns("states")
    with pytest.raises(ValueError, match="States are needed here"):
        check_dataset(dataset)
    with pytest.raises(ValueError, match="empty"):
        check_dataset(Dataset.from_list([RECORD]).select([]))
