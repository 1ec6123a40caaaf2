"""Batches of encoder-decoder models with random options: the greedy text, whichever rows end together."""

import functools

import pytest
import torch
from conftest import VOCAB_SIZE
from fuzzing import fuzz
from hypothesis import given
from hypothesis import strategies as st
from test_encoder_decoder import CONFIGS, make_model
from transformers import LogitsProcessor, LogitsProcessorList


class Broken(LogitsProcessor):
    """Raises an error of the caller's own at a given length."""

    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] >= self.length:
            raise ArithmeticError("the caller's own")
        return scores


@functools.cache
def model_of(name, seed):
    return make_model(name, seed)


OPTIONS = [{"repetition_penalty": 1.4}, {"no_repeat_ngram_size": 2}, {"min_new_tokens": 4}, {"bad_words_ids": [[5]]}]


@st.composite
def cases(draw):
    model = draw(st.sampled_from(sorted(CONFIGS))), draw(st.integers(0, 2))
    batch_size, length = draw(st.integers(1, 5)), draw(st.integers(2, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    ids = torch.randint(3, VOCAB_SIZE, (batch_size, length), generator=generator)
    padding = torch.randint(0, length, (batch_size, 1), generator=generator)
    mask = (torch.arange(length) < length - padding).long() if draw(st.booleans()) else torch.ones_like(ids)
    options = {"max_new_tokens": draw(st.integers(1, 30)), "do_sample": False, "eos_token_id": None}
    for entry in draw(st.lists(st.sampled_from(OPTIONS), max_size=2)):
        options.update(entry)
    stops = draw(st.lists(st.integers(3, VOCAB_SIZE - 1), max_size=8))
    if stops:
        options["eos_token_id"] = stops
    if draw(st.integers(0, 3)) == 0:
        options["use_cache"] = False
    if draw(st.integers(0, 3)) == 0:
        options["decoder_input_ids"] = ids[:, :2]
    block_size = draw(st.one_of(st.integers(1, 8), st.sampled_from([16, "auto"])))
    error_at = draw(st.one_of(st.none(), st.none(), st.integers(2, 12)))
    return model, {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}, options, block_size, error_at


def outcome(model, inputs, options, error_at, **extra):
    processors = LogitsProcessorList([] if error_at is None else [Broken(error_at)])
    try:
        return model.generate(**inputs, **options, logits_processor=processors, **extra).tolist()
    except ArithmeticError as error:
        return str(error)


def check(case):
    model, inputs, options, block_size, error_at = case
    model = model_of(*model)
    expected = outcome(model, inputs, options, error_at)
    assert outcome(model, inputs, options, error_at, jacobi_block_size=block_size) == expected


@fuzz(15)
@given(cases())
def test_a_few_batches(case):
    check(case)


@pytest.mark.slow
@fuzz(300)
@given(cases())
def test_batches(case):
    check(case)
