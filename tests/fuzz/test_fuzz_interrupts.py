"""
A call that is interrupted anywhere leaves the cache of the user as it was, in every layer.

The exception comes from a module of the model, from a processor, a criterion or a streamer of the caller, or, as
Ctrl-C does, from any line of the decoding itself.
"""

import functools
import sys
from pathlib import Path

import pytest
import torch
from architectures import make_architecture
from conftest import CONFIGS, VOCAB_SIZE, make_model
from fuzzing import fuzz
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

import cllm_hf


MODELS = [*sorted(CONFIGS), "gemma2", "opt", "glm_moe_dsa"]
SOURCES = ["module", "processor", "criterion", "streamer", "line"]
ERRORS = [KeyboardInterrupt, RuntimeError, torch.OutOfMemoryError, SystemExit]
DECODING = str(Path(cllm_hf.__file__).parent / "decoding")


@functools.cache
def model_of(name):
    model = make_model(name) if name in CONFIGS else make_architecture(name)
    model.generation_config.update(max_length=None, min_length=None)
    return model


class Countdown:
    """Raises once, at the call of this number."""

    def __init__(self, error, count):
        self.error, self.left = error, count

    def __call__(self, *_):
        self.left -= 1
        if self.left == 0:
            raise self.error

    def trace(self, frame, event, _):
        if not frame.f_code.co_filename.startswith(DECODING) or "abandon" in frame.f_code.co_name:
            return None
        if event == "line":
            self()
        return self.trace


class Processor(LogitsProcessor):
    def __init__(self, countdown):
        self.countdown = countdown

    def __call__(self, input_ids, scores):
        self.countdown()
        return scores


class Criterion(StoppingCriteria):
    def __init__(self, countdown):
        self.countdown = countdown

    def __call__(self, input_ids, scores, **kwargs):
        self.countdown()
        return torch.zeros(len(input_ids), dtype=torch.bool)


class Streamer(BaseStreamer):
    def __init__(self, countdown):
        self.countdown = countdown

    def put(self, value):
        self.countdown()

    def end(self):
        self.countdown()


def generate(model, source, countdown, module, **options):
    """Decode with something that counts its calls and raises."""
    if source == "processor":
        options["logits_processor"] = LogitsProcessorList([Processor(countdown)])
    if source == "criterion":
        options["stopping_criteria"] = StoppingCriteriaList([Criterion(countdown)])
    if source == "streamer":
        options["streamer"] = Streamer(countdown)
    hook = module.register_forward_hook(countdown) if source == "module" else None
    previous = sys.gettrace()
    try:
        if source == "line":
            sys.settrace(countdown.trace)
        return model.generate(**options)
    finally:
        sys.settrace(previous)
        if hook is not None:
            hook.remove()


def snapshot(cache):
    """Everything that a cache holds, copied."""
    return [
        {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in vars(layer).items()}
        for layer in cache.layers
    ]


def assert_equal(found, expected):
    assert len(found) == len(expected)
    for layer, other in zip(found, expected):
        assert layer.keys() == other.keys()
        for name, value in layer.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, other[name]), name
            else:
                assert value == other[name], name


@st.composite
def cases(draw):
    name = draw(st.sampled_from(MODELS))
    batch_size = draw(st.sampled_from([1, 1, 1, 3]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    first = torch.randint(3, VOCAB_SIZE, (batch_size, draw(st.integers(1, 14))), generator=generator)
    more = torch.randint(3, VOCAB_SIZE, (batch_size, draw(st.integers(1, 6))), generator=generator)
    has_indexer = name == "glm_moe_dsa"  # takes no trees, and no cache without a config
    kind = draw(st.sampled_from(["filled", "filled", "filled", "empty", "empty" if has_indexer else "bare"]))
    options = {
        "jacobi_block_size": draw(st.sampled_from([1, 2, 5, 16, "auto"])),
        "jacobi_candidates": draw(st.sampled_from([0, 0, 2])) if not has_indexer else 0,
        "max_new_tokens": draw(st.integers(2, 24)),
        "do_sample": False,
    }
    source = draw(st.sampled_from(SOURCES if batch_size == 1 else [*SOURCES[:3], "line"]))
    module = draw(st.integers(0, len(list(model_of(name).modules())) - 1))
    most = 1500 if source == "line" else 12
    countdown = draw(st.sampled_from(ERRORS)), draw(st.integers(1, most))
    return name, first, more, kind, options, source, module, countdown


@torch.no_grad()
def check(case):
    name, first, more, kind, options, source, module, (error, count) = case
    model, countdown = model_of(name), Countdown(error, count)
    module = list(model.modules())[module]
    cache = DynamicCache() if kind == "bare" else DynamicCache(config=model.config)
    ids = first
    if kind == "filled":
        model(first, past_key_values=cache)
        ids = torch.cat([first, more], dim=1)
    options = {**options, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    before = snapshot(cache)
    try:
        generate(model, source, countdown, module, past_key_values=cache, **options)
    except countdown.error:
        assert countdown.left <= 0
    else:
        assert countdown.left > 0  # nothing was raised, and nothing swallowed
        return
    assert_equal(snapshot(cache), before)
    # And the next turn is right.
    decoded = model.generate(**options, past_key_values=cache)
    plain = {name: value for name, value in options.items() if not name.startswith("jacobi")}
    assert decoded.tolist() == model.generate(**plain).tolist()


@fuzz(30)
@given(cases())
def test_a_few_interrupts(case):
    check(case)


@pytest.mark.slow
@fuzz(400)
@given(cases())
def test_interrupts(case):
    check(case)
