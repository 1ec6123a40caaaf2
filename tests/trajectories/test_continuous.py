"""Continuous batching gives the responses of `generate`, one prompt at a time, whatever is decoded beside."""

import random

import pytest
import torch
from architectures import KINDS, make_architecture
from conftest import make_model
from transformers import GenerationConfig

from cllm_hf.trajectories import continuous
from cllm_hf.trajectories.continuous import ContinuousBatch, count_rows
from cllm_hf.trajectories.responding import Fitting, without_generation_defaults


STOP_IDS = range(7, 20)


def make_prompts(model, count=9, longest=13):
    rng, known = random.Random(0), model.config.get_text_config().vocab_size
    return [[rng.randrange(3, known) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def generate(model, prompt, max_new_tokens=12):
    options = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=list(STOP_IDS), pad_token_id=0
    )
    with without_generation_defaults(model), torch.no_grad():
        return model.generate(torch.tensor([prompt]), generation_config=options)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("num_rows, tokens_per_prefill", [(1, 1), (2, 20), (4, 1000), (8, 20), (64, 1000)])
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt2"])
def test_responses_are_those_of_generate(model_type, num_rows, tokens_per_prefill, monkeypatch):
    monkeypatch.setattr(continuous, "_COLUMNS_AT_ONCE", 8)
    model = make_architecture(model_type).eval()
    prompts = make_prompts(model)
    expected = [generate(model, prompt) for prompt in prompts]
    assert len({len(response) for response in expected}) > 2, "rows must end at different times"
    told = []
    batch = ContinuousBatch(model, 12, STOP_IDS, num_rows, tokens_per_prefill)
    assert batch.run(prompts, told.append) == expected
    assert told == sorted(set(told)) and told[-1] == len(prompts)
    assert batch.run(prompts[:2]) == expected[:2]  # it begins anew


@pytest.mark.slow
@pytest.mark.parametrize("model_type", KINDS)
def test_every_kind_of_architecture(model_type):
    model = make_architecture(model_type).eval()
    prompts = make_prompts(model)
    expected = [generate(model, prompt) for prompt in prompts]
    assert ContinuousBatch(model, 12, STOP_IDS, 4, 20).run(prompts) == expected


def test_a_place_that_comes_free_is_filled_before_the_others_end(monkeypatch):
    model = make_model("llama")
    prompts, sizes = make_prompts(model, count=12), []
    forward = type(model).forward

    def watched(self, input_ids, **kwargs):
        if input_ids.shape[1] == 1:
            sizes.append(len(input_ids))
        return forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(type(model), "forward", watched)
    expected = [len(response) for response in ContinuousBatch(model, 12, STOP_IDS, 4, 1000).run(prompts)]
    # The first token of a response comes with its prompt. A prompt of one token is read in a pass of its own.
    assert sum(sizes) - sum(len(prompt) == 1 for prompt in prompts) <= sum(expected) - len(prompts)
    assert sizes.count(4) > max(expected)


def test_rows_follow_from_the_memory_of_the_device_alone(monkeypatch):
    model = make_model("llama")
    assert count_rows(model, 100) == continuous._MOST_ROWS_ON_CPU
    token = continuous._bytes_per_token(model)
    config = model.config
    assert token == 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    monkeypatch.setattr(continuous, "_total_memory", lambda device: 4 * 10 * 100 * token)
    assert count_rows(model, 100) == 10
    assert count_rows(model, 10**9) == 1


def test_half_the_rows_where_memory_runs_out(caplog):
    fitting, tried = Fitting(), []

    def compute(num_rows):
        tried.append(num_rows)
        if num_rows > 3:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return num_rows

    assert fitting.run(compute, 16) == 2
    assert fitting.run(compute, 16) == 2 and fitting.run(compute, 1) == 1
    assert tried == [16, 8, 4, 2, 2, 1]
    assert "Memory ran out with 16 rows at once. Going on with 8." in caplog.text

    def fail(num_rows):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        fitting.run(fail, 16)

    def never_fits(num_rows):
        raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    with pytest.raises(RuntimeError, match="out of memory"):
        fitting.run(never_fits, 16)
