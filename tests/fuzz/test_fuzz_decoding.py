"""Everything at once, drawn at random: architecture, batch, padding, block size, options, dtype."""

import copy
import functools

import pytest
import torch
from architectures import make_architecture
from conftest import CONFIGS, VOCAB_SIZE, make_model
from fuzzing import fuzz
from hypothesis import given
from hypothesis import strategies as st
from lossless_models import ATTENTION, NUM_MASKS, add_random_adapter, knowing
from test_parity import AtLength, EveryThirdCall
from transformers import LogitsProcessorList, StoppingCriteriaList

import cllm_hf  # noqa: F401
from cllm_hf.decoding import feeding


SINGLE_ROWS = ["mamba", "mamba2", "openai-gpt", "rwkv", "deepseek_v4"]
OTHERS = (
    "bamba biogpt bloom cohere2 deepseek_v3 falcon falcon_h1 gemma2 gemma3n_text glm4 gpt_neo gptj granitemoehybrid "
    "jamba lfm2 llama4_text mpt olmo2 opt qwen3_next recurrent_gemma roberta smollm3 trocr"
).split()
NAMES = sorted([*CONFIGS, *SINGLE_ROWS, *OTHERS])


@functools.cache
def model_of(name, scale=4.0, dtype=torch.float32):
    model = make_model(name, scale=scale) if name in CONFIGS else make_architecture(name)
    model.generation_config.update(max_length=None, min_length=None)
    return model.to(dtype)


@functools.cache
def rounded_model_of(name):
    """In float32, with the weights that the model has in bfloat16."""
    return copy.deepcopy(model_of(name, scale=2.0, dtype=torch.bfloat16)).float()


def draw_prompts(draw, name):
    batch_size = 1 if name in SINGLE_ROWS else draw(st.integers(1, 4))
    length = draw(st.integers(1, 24))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    ids = torch.randint(3, VOCAB_SIZE, (batch_size, length), generator=generator)
    padding = [draw(st.integers(0, length - 1)) for _ in range(batch_size)]
    if draw(st.booleans()) or name in SINGLE_ROWS:
        padding = [0] * batch_size
    mask = (torch.arange(length) >= torch.tensor(padding)[:, None]).long()
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


OPTIONS = [
    {"repetition_penalty": 1.4},
    {"no_repeat_ngram_size": 2},
    {"min_new_tokens": 4},
    {"bad_words_ids": [[5], [7, 9]]},
    {"suppress_tokens": list(range(10, 30))},
    {"sequence_bias": {(11,): 5.0}},
    {"exponential_decay_length_penalty": (5, 1.5)},
]
SAMPLING = [{"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}]


@st.composite
def cases(draw):
    name = draw(st.sampled_from(NAMES))
    options = {"max_new_tokens": draw(st.integers(1, 40)), "do_sample": draw(st.sampled_from([False, False, True]))}
    for entry in draw(st.lists(st.sampled_from(OPTIONS + (SAMPLING if options["do_sample"] else [])), max_size=2)):
        options.update(entry)
    stops = draw(st.lists(st.integers(3, VOCAB_SIZE - 1), max_size=5))
    if stops or "exponential_decay_length_penalty" in options:
        options["eos_token_id"] = stops or [4]
    own = (draw(st.sampled_from([False, False, False, True])), draw(st.sampled_from([False, False, False, True])))
    block_size = draw(st.one_of(st.integers(1, 8), st.sampled_from([16, 33, "auto"])))
    return name, draw_prompts(draw, name), options, own, block_size, draw(st.booleans())


def generate(model, prompts, options, own, **extra):
    return model.generate(
        **prompts,
        **options,
        logits_processor=LogitsProcessorList([EveryThirdCall()] if own[0] else []),
        stopping_criteria=StoppingCriteriaList([AtLength()] if own[1] else []),
        return_dict_in_generate=True,
        **extra,
    )


def check(case, **extra):
    """The text is the greedy one, or the sample of block size 1, in no more forward passes than tokens."""
    name, prompts, options, own, block_size, _ = case
    model = model_of(name)
    if options["do_sample"]:
        options = {**options, "jacobi_seed": 7}
    plain = {"jacobi_block_size": 1} if options["do_sample"] else {}
    expected = generate(model, prompts, options, own, **plain)
    output = generate(model, prompts, options, own, jacobi_block_size=block_size, **extra)
    assert output.sequences.tolist() == expected.sequences.tolist()
    stats = output.jacobi_stats
    assert stats.num_forwards <= output.sequences.shape[1] - prompts["input_ids"].shape[1]
    assert max(map(max, stats.num_committed)) <= (64 if block_size == "auto" else block_size)


@pytest.mark.slow
@fuzz(1200)
@given(cases())
def test_random_cases(case):
    check(case, use_cache=case[-1])


TAKES_TREES = sorted([*CONFIGS, "deepseek_v3", "opt", "gemma2", "gemma3n_text", "gptj", "olmo2", "roberta"])
CANDIDATE_CASES = (cases().filter(lambda case: case[0] in TAKES_TREES), st.sampled_from([2, 4]))


@fuzz(25)
@given(*CANDIDATE_CASES)
def test_a_few_random_cases_with_candidates(case, candidates):
    check(case, jacobi_candidates=candidates)


@pytest.mark.slow
@fuzz(500)
@given(*CANDIDATE_CASES)
def test_random_cases_with_candidates(case, candidates):
    check(case, jacobi_candidates=candidates)


@functools.cache
def lossless_model_of(model_name, seed, dropout):
    # Where layers after attention see tokens without their rows, the adapter is on attention alone.
    target_modules = None if model_name in ALL_LINEAR else ATTENTION
    model = add_random_adapter(model_of(model_name), seed=seed, dropout=dropout, target_modules=target_modules)
    for name, module in model.named_modules():
        if name.endswith("lora_dropout"):
            module.train()  # as in training, where the base model's own stays off
    return model


ALL_LINEAR = {"llama", "qwen3", "gpt2", "gpt_neox", "gemma3", "mistral", "gemma2", "gemma3n_text", "gptj", "olmo2"}
LOSSLESS = sorted([*ALL_LINEAR, "mixtral", "deepseek_v3", "opt", "biogpt"])


@st.composite
def lossless_cases(draw):
    """A case, a random adapter on its model, which may know what is to come, and how it decodes."""
    case = draw(cases().filter(lambda case: case[0] in LOSSLESS))
    name, prompts, options, own, _, _ = case
    adapter = draw(st.integers(0, 2)), draw(st.sampled_from([0.0, 0.0, 0.5]))
    error, seed = draw(st.sampled_from([0.0, 0.1, 0.3, 1.0])), draw(st.integers(0, 100))
    extra = {
        "jacobi_block_size": draw(st.one_of(st.integers(1, NUM_MASKS + 1), st.just("auto"))),
        "jacobi_drafts": draw(st.sampled_from([None, 1, 2, 3, NUM_MASKS + 1])),
        "jacobi_candidates": draw(st.sampled_from([0, 0, 1, 4, 20])),
    }
    largest = draw(st.sampled_from([2**24, 2**24, 30]))  # mask of a prompt with which a tree is fed
    return name, prompts, options, own, adapter, (error, seed), extra, largest


def check_lossless(case):
    """The text is the base model's, or its sample, in no more forward passes than tokens."""
    name, prompts, options, own, adapter, (error, seed), extra, largest = case
    base, model = model_of(name), lossless_model_of(name, *adapter)
    if options["do_sample"]:
        options = {**options, "jacobi_seed": 7}
    plain = {"jacobi_block_size": 1} if options["do_sample"] else {}
    expected = generate(base, prompts, options, own, **plain)
    with (
        pytest.MonkeyPatch.context() as patch,
        knowing(expected.sequences.tolist(), seed, error, extra["jacobi_candidates"]),
    ):
        patch.setattr(feeding, "_LARGEST_PREFILL_MASK", largest)
        output = generate(model, prompts, options, own, **extra)
    assert output.sequences.tolist() == expected.sequences.tolist()
    stats = output.jacobi_stats
    assert stats.num_forwards <= output.sequences.shape[1] - prompts["input_ids"].shape[1]
    assert max(map(max, stats.num_committed)) <= NUM_MASKS + 1


@fuzz(15)
@given(lossless_cases())
def test_a_few_random_cases_with_lossless_adapters(case):
    check_lossless(case)


@pytest.mark.slow
@fuzz(500)
@given(lossless_cases())
def test_random_cases_with_lossless_adapters(case):
    check_lossless(case)


@st.composite
def bfloat16_cases(draw):
    name = draw(st.sampled_from([name for name in NAMES if name not in SINGLE_ROWS]))
    return name, draw_prompts(draw, name), draw(st.sampled_from([2, 5, 16]))


@pytest.mark.slow
@fuzz(300)
@given(bfloat16_cases())
@torch.no_grad()
def test_differences_in_bfloat16_sit_at_near_ties(case):
    """
    Where texts part, the two tokens were closer than what rounding does to logits there: greedy decoding's own differ
    as much from those that the same weights have in float32.
    """
    name, prompts, block_size = case
    model = model_of(name, scale=2.0, dtype=torch.bfloat16)
    exact_model = rounded_model_of(name)
    options = {**prompts, "do_sample": False, "max_new_tokens": 30}
    greedy = model.generate(**options, return_dict_in_generate=True, output_logits=True)
    decoded = model.generate(**options, jacobi_block_size=block_size)
    length = prompts["input_ids"].shape[1]
    for row in range(decoded.shape[0]):
        apart = (greedy.sequences[row] != decoded[row]).nonzero()
        if not len(apart):
            continue
        place = apart[0].item()
        logits = greedy.logits[place - length][row].float()
        gap = logits[greedy.sequences[row, place]] - logits[decoded[row, place]]
        text = greedy.sequences[row : row + 1, :place][:, -(prompts["attention_mask"][row].sum() + place - length) :]
        rounding = (exact_model(text).logits[0, -1] - logits).abs().max()
        assert 0 <= gap <= 4 * rounding
