"""
Lossless decoding: whatever an adapter drafts, the text is the base model's own, and a sample one of its samples.

"Equal" always means: token for token what an untouched copy of the base model returns. Adapters are random and large,
so that their drafts are wrong; `knowing` has drafts be right now and then.
"""

import functools
import itertools
from contextlib import nullcontext

import pytest
import torch
from architectures import make_architecture
from conftest import CONFIGS, make_model, make_prompts
from lossless_models import (
    ATTENTION,
    NUM_MASKS,
    add_random_adapter,
    cycle_text,
    knowing,
    make_cycle_model,
    train_adapter,
)
from test_compiled import graphs  # noqa: F401
from test_parity import AtLength, EveryThirdCall, Recorder
from test_sampling import exact_distribution, one_at_a_time
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache, LogitsProcessorList, StoppingCriteriaList

import cllm_hf
from cllm_hf.blocks.rules import judge_greedy
from cllm_hf.decoding import feeding


BLOCK_SIZES = (1, 2, 4, NUM_MASKS + 1, "auto")
# Rotary, learned and bounded positions, sliding windows, parallel layers, fused projections, and experts.
ARCHITECTURES = [*CONFIGS, "phi3", "opt", "qwen2_moe", "gemma2", "falcon"]
# Their experts, or in OPT the layers after attention, see tokens without their rows.
ATTENTION_ALONE = ("mixtral", "qwen2_moe", "opt")
# In the default run, only what comes first.
SLOW = functools.partial(pytest.param, marks=pytest.mark.slow)


@functools.cache
def pair_of(name, attention="sdpa"):
    """A base model, and a copy of it with a random adapter."""
    base = make_model(name, attention=attention) if name in CONFIGS else make_architecture(name)
    base.generation_config.update(max_length=None, min_length=None)
    return base, add_random_adapter(base, target_modules=ATTENTION if name in ATTENTION_ALONE else None)


def generate(model, prompts, **options):
    options = {"do_sample": False, "max_new_tokens": 16, "return_dict_in_generate": True, **options}
    return model.generate(input_ids=prompts[0], attention_mask=prompts[1], **options)


def assert_equal(pair, prompts, knows=True, drafts=None, block_size=NUM_MASKS + 1, candidates=0, **options):
    """Decode by the base model and with the adapter, which may know what is to come."""
    base, model = pair
    greedy = generate(base, prompts, **options).sequences
    extra = {"jacobi_block_size": block_size, "jacobi_drafts": drafts, "jacobi_candidates": candidates}
    with knowing(greedy.tolist(), error=0.2, num_candidates=candidates) if knows else nullcontext():
        output = generate(model, prompts, **options, **extra)
    assert output.sequences.tolist() == greedy.tolist()
    stats = output.jacobi_stats
    assert stats.num_forwards <= greedy.shape[1] - prompts[0].shape[1]
    assert block_size == "auto" or max(map(max, stats.num_committed)) <= block_size
    return stats


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(name):
    assert_equal(pair_of(name), make_prompts(1, 1), knows=False, block_size=3)
    stats = assert_equal(pair_of(name), make_prompts(4))
    assert stats.tokens_per_forward > 1.2  # drafts are accepted, or this would say little


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_in_all_ways(name, attention):
    numbers = itertools.cycle([None, 1, 3, NUM_MASKS + 1, 2])
    for batch_size in (1, 4):
        for length in (1, 9, 20):
            for block_size in BLOCK_SIZES:
                for knows in (False, True):
                    prompts = make_prompts(batch_size, length)
                    assert_equal(pair_of(name, attention), prompts, knows, next(numbers), block_size)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("name", ["llama", "gemma3", *map(SLOW, ("gpt2", "gpt_neox", "mistral", "qwen3", "mixtral"))])
def test_trees_of_further_choices(name, batch_size):
    """What is accepted may stand anywhere in the tree, and moves to the front of the cache."""
    for block_size, candidates, drafts in ((7, 5, None), (4, 2, 1), (3, 12, 100), ("auto", 3, 2)):
        for knows in (True, False):
            prompts = make_prompts(batch_size)
            stats = assert_equal(pair_of(name), prompts, knows, drafts, block_size, candidates)
        prompts = make_prompts(batch_size)
        assert_equal(pair_of(name), prompts, True, drafts, block_size, candidates, repetition_penalty=1.3)
    assert stats.num_forwards


@pytest.mark.parametrize("name", ["gemma3", SLOW("llama")])
def test_numbers_of_drafts_and_block_sizes(name):
    for drafts, block_size in ((1, 7), (2, 4), (7, 7), (100, 5), (None, 1), (3, "auto")):
        assert_equal(pair_of(name, "eager"), make_prompts(3), drafts=drafts, block_size=block_size)


@pytest.mark.parametrize("name", ["gemma3", SLOW("llama"), SLOW("gpt2")])
def test_stop_token_anywhere_in_a_block(name):
    base, model = pair_of(name)
    prompts = make_prompts(4)
    greedy = generate(base, prompts).sequences[:, prompts[0].shape[1] :]
    for place in (0, 1, 3, 6, 7):
        assert_equal((base, model), prompts, eos_token_id=greedy[0, place].item())
    assert_equal((base, model), prompts, eos_token_id=greedy[:, 5].tolist())
    assert_equal((base, model), make_prompts(1), eos_token_id=greedy[0, 4].item())


@pytest.mark.parametrize("batch_size", [1, 4])
def test_length_limits_that_cut_a_block(batch_size):
    for limit in (
        {"max_new_tokens": 1},
        {"max_new_tokens": 7},
        {"max_new_tokens": None, "max_length": 22},
        {"min_new_tokens": 9, "eos_token_id": list(range(3, 30))},
    ):
        assert_equal(pair_of("llama"), make_prompts(batch_size), **limit)


@pytest.mark.parametrize("batch_size", [4, SLOW(1)])
@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [[5], [7, 9]]},
        {"forced_eos_token_id": 3, "eos_token_id": 3},
        {"suppress_tokens": list(range(10, 40))},
        {"sequence_bias": {(11,): 5.0}},
        {"exponential_decay_length_penalty": (5, 1.5), "eos_token_id": 3},
        {"prefix_allowed_tokens_fn": lambda row, ids: list(range(3 + row, 30 + row))},
    ],
    ids=lambda options: next(iter(options)),
)
def test_processors(options, batch_size):
    assert_equal(pair_of("llama"), make_prompts(batch_size), **options)


@pytest.mark.parametrize("num_stop_ids", [0, 4])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_processors_criteria_and_streamers_of_the_user(batch_size, num_stop_ids):
    base, model = pair_of("llama")
    outputs, recorders = [], [Recorder(), Recorder()]
    for used, recorder in zip((base, model), recorders):
        output = generate(
            used,
            make_prompts(batch_size),
            logits_processor=LogitsProcessorList([EveryThirdCall()]),
            stopping_criteria=StoppingCriteriaList([AtLength()]),
            streamer=recorder,
            eos_token_id=list(range(30, 30 + num_stop_ids)) or None,
        )
        outputs.append(output.sequences.tolist())
    assert outputs[0] == outputs[1]
    assert recorders[0].values == recorders[1].values and recorders[1].ended


@pytest.mark.parametrize("batch_size", [1, 3])
def test_stop_strings(byte_tokenizer, batch_size):
    base = make_model("llama", vocab_size=len(byte_tokenizer))
    texts = ["Once upon a time", "Mia has 7", "The"][:batch_size]
    inputs = byte_tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    prompts = inputs["input_ids"], inputs["attention_mask"]
    stop_string = byte_tokenizer.decode(generate(base, prompts).sequences[0, -9:-6])
    options = {"stop_strings": [stop_string], "tokenizer": byte_tokenizer}
    assert_equal((base, add_random_adapter(base)), prompts, **options)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_cache_of_the_user_goes_on_for_a_second_turn(name):
    base, model = pair_of(name)
    prompt, _ = make_prompts(1, 15)
    sequences, lengths = [], []
    for used in (base, model):
        cache = DynamicCache(config=base.config)
        with torch.no_grad():
            base(prompt[:, :11], past_key_values=cache)
        ids = prompt
        for _ in range(2):
            output = generate(used, (ids, torch.ones_like(ids)), max_new_tokens=12, past_key_values=cache)
            assert output.past_key_values is cache
            ids = torch.cat([output.sequences, prompt[:, :3]], dim=1)
        sequences.append(ids.tolist())
        lengths.append(cache.get_seq_length())
    assert sequences[0] == sequences[1] and lengths[0] == lengths[1] == ids.shape[1] - 4


def test_a_cache_of_the_user_in_a_batch_is_left_as_it_was():
    base, model = pair_of("llama")
    prompt, mask = make_prompts(3, 15, padding=False)
    cache = DynamicCache(config=base.config)
    with torch.no_grad():
        base(prompt[:, :11], past_key_values=cache)
    keys = cache.layers[0].keys.clone()
    output = generate(model, (prompt, mask), past_key_values=cache)
    assert torch.equal(output.sequences, generate(base, (prompt, mask)).sequences)
    assert torch.equal(cache.layers[0].keys, keys)


def test_prompt_as_embeddings():
    base, model = pair_of("llama")
    ids, mask = make_prompts(3)
    options = {"inputs_embeds": base.get_input_embeddings()(ids), "attention_mask": mask, "do_sample": False}
    greedy = base.generate(**options, max_new_tokens=20)
    assert model.generate(**options, max_new_tokens=20).tolist() == greedy.tolist()


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_prompts_that_are_too_long_for_the_mask_of_a_tree(monkeypatch, name):
    """The first forward pass then drafts nothing, and the second one does."""
    monkeypatch.setattr(feeding, "_LARGEST_PREFILL_MASK", 4)
    for batch_size in (1, 4):
        stats = assert_equal(pair_of(name), make_prompts(batch_size))
        assert max(committed[0] for committed in stats.num_committed) == 1 and stats.tokens_per_forward > 1.2


@pytest.mark.parametrize("block_size", [1, NUM_MASKS + 1])
def test_frozen_output_embeddings_are_not_copied(block_size):
    """A product with a view of the last columns would stack them, which takes a CPU longer than the forward pass."""
    _, model = pair_of("llama")

    def is_by_output_embeddings(shapes):
        return len(shapes) == 2 and shapes[1][-2:] == [model.config.hidden_size, model.config.vocab_size]

    assert not any(parameter.requires_grad for parameter in model.get_output_embeddings().parameters())
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as run:
        generate(model, make_prompts(1), jacobi_block_size=block_size)
    products = {event.name for event in run.events() if is_by_output_embeddings(event.input_shapes)}
    assert "aten::mm" in products and "aten::bmm" not in products


def test_unusual_masks():
    ids, mask = make_prompts(3)
    mask[0, 4] = mask[2, 7] = 0
    assert_equal(pair_of("llama"), (ids, mask))
    mask[1] = 0  # a row of padding alone
    assert_equal(pair_of("llama"), (ids, mask))
    mask[0, -2:] = 0  # padding on the right
    assert_equal(pair_of("llama"), (ids, mask))


class AtTheEnd(AtLength):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= 64)


@pytest.mark.parametrize("batch_size", [4, SLOW(1)])
def test_no_position_beyond_the_last_one_is_used(batch_size):
    """The learned positions of this model end where the text does, though the caller would let it go on."""
    base = make_model("gpt2", n_positions=64)
    pair, prompts = (base, add_random_adapter(base)), make_prompts(batch_size, padding=False)
    for block_size in (2, NUM_MASKS + 1):
        assert_equal(pair, prompts, block_size=block_size, max_new_tokens=None, max_length=64)
        limits = {"max_new_tokens": 100, "stopping_criteria": StoppingCriteriaList([AtTheEnd()])}
        assert_equal(pair, prompts, block_size=block_size, **limits)


SAMPLING = [{}, {"temperature": 0.7, "top_k": 5}, {"top_p": 0.8}, {"repetition_penalty": 1.3}]


@torch.no_grad()
@pytest.mark.parametrize("options", SAMPLING, ids=str)
def test_samples_are_those_of_the_base_model_for_every_block_size(options):
    base, model = pair_of("llama")
    for batch_size, block_sizes in ((1, ("auto",)), (3, (1, 3, NUM_MASKS + 1))):
        ids, mask = make_prompts(batch_size)
        expected = one_at_a_time(base, ids, mask, 11, 16, **options).tolist()
        sampling = {"do_sample": True, "max_new_tokens": 16, "jacobi_seed": 11, **{"top_k": 0, **options}}
        for block_size in block_sizes:
            with knowing(expected, error=1.0 if block_size == 3 else 0.2):
                output = generate(model, (ids, mask), **sampling, jacobi_block_size=block_size)
            assert output.sequences.tolist() == expected


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "top_k": 5}], ids=str)
def test_chi_square_against_the_exact_distribution(options):
    """60,000 samples of two tokens, against the probabilities of all pairs; fails one time in a million by chance."""
    vocab_size, num_samples = 8, 60_000
    base = make_model("llama", scale=3.0, vocab_size=vocab_size)
    model, prompt = add_random_adapter(base), torch.tensor([[3, 5, 4, 7]])
    expected = exact_distribution(base, prompt, vocab_size, **options).flatten() * num_samples
    counts = torch.zeros(vocab_size**2, dtype=torch.double)
    for seed in range(12):
        sequences = model.generate(
            input_ids=prompt,
            do_sample=True,
            max_new_tokens=2,
            num_return_sequences=num_samples // 12,
            jacobi_block_size=2,
            jacobi_seed=seed,
            **{"top_k": 0, **options},
        )
        counts += torch.bincount(sequences[:, 4] * vocab_size + sequences[:, 5], minlength=vocab_size**2)
    assert counts[expected == 0].sum() == 0
    often = expected >= 10
    observed = torch.cat([counts[often], counts[~often].sum()[None]])
    wanted = torch.cat([expected[often], expected[~often].sum()[None]])
    observed, wanted = observed[wanted > 5], wanted[wanted > 5]
    statistic, degrees = ((observed - wanted) ** 2 / wanted).sum(), torch.tensor(len(wanted) - 1.0).double()
    assert len(wanted) > 8 and torch.special.gammaincc(degrees / 2, statistic / 2).item() > 1e-6


@pytest.fixture(scope="module")
def counting(tmp_path_factory):
    """A model that counts, and an adapter for it, trained for 60 steps and loaded again."""
    base, folder = make_cycle_model(), tmp_path_factory.mktemp("adapter")
    train_adapter(base, folder)
    model = cllm_hf.load_cllm(folder, base_model=make_cycle_model())
    model.generation_config.update(eos_token_id=None)
    return base, model


def test_a_trained_drafter_has_its_drafts_accepted(counting):
    """At least 3 tokens per forward pass of at most 7 (4.4 measured; a random adapter reaches 1.0)."""
    base, model = counting
    ids = cycle_text(torch.tensor([[3]]), 5)
    prompts = ids, torch.ones_like(ids)
    greedy = generate(base, prompts, max_new_tokens=48).sequences
    assert torch.equal(greedy, cycle_text(torch.tensor([[3]]), 53))
    output = generate(model, prompts, max_new_tokens=48, jacobi_block_size=7)
    assert torch.equal(output.sequences, greedy) and output.jacobi_stats.tokens_per_forward >= 3
    # Sampling takes the same drafts, and more blocks of masks do not make fewer tokens.
    sampled = generate(model, prompts, max_new_tokens=48, jacobi_block_size=7, do_sample=True, jacobi_seed=1)
    assert sampled.jacobi_stats.tokens_per_forward >= 2.5
    everywhere = generate(model, prompts, max_new_tokens=48, jacobi_block_size=7, jacobi_drafts=7)
    assert everywhere.jacobi_stats.num_forwards <= output.jacobi_stats.num_forwards + 1
    wider = generate(model, prompts, max_new_tokens=48, jacobi_block_size=4, jacobi_candidates=6, jacobi_drafts=99)
    narrow = generate(model, prompts, max_new_tokens=48, jacobi_block_size=4, jacobi_drafts=99)
    assert torch.equal(wider.sequences, greedy)
    assert wider.jacobi_stats.num_forwards <= narrow.jacobi_stats.num_forwards
    with model.disable_adapter():
        assert not hasattr(generate(model, prompts, max_new_tokens=8), "jacobi_stats")


@pytest.mark.parametrize("name", ["gpt2", SLOW("llama"), SLOW("gemma3")])
def test_other_decodings_are_those_of_the_base_model(name):
    base, model = pair_of(name)
    for prompts in (make_prompts(1), make_prompts(3)):
        greedy, jacobi = generate(base, prompts), generate(base, prompts, decoding="jacobi", jacobi_block_size=8)
        found = generate(model, prompts, decoding="autoregressive")
        assert torch.equal(found.sequences, greedy.sequences) and not hasattr(found, "jacobi_stats")
        found = generate(model, prompts, decoding="jacobi", jacobi_block_size=8)
        assert torch.equal(found.sequences, greedy.sequences)
        assert found.jacobi_stats.num_forwards == jacobi.jacobi_stats.num_forwards
        with model.disable_adapter():
            for options in ({}, {"decoding": "jacobi"}, {"decoding": "lossless"}):
                assert torch.equal(generate(model, prompts, **options).sequences, greedy.sequences)


def test_a_default_block_size_is_cut_to_what_the_adapter_drafts():
    base = make_model("llama")
    model, prompts = add_random_adapter(base, num_masks=4), make_prompts(1)
    greedy = generate(base, prompts).sequences
    model.get_base_model().generation_config.jacobi_block_size = 32
    with knowing(greedy.tolist(), error=0.0):
        output = generate(model, prompts, jacobi_drafts=5)
    assert torch.equal(output.sequences, greedy)
    assert max(output.jacobi_stats.num_committed[0]) == 5


def test_what_makes_no_sense_is_refused():
    base, model = pair_of("llama")
    prompts = make_prompts(1)
    for used, options, message in (
        (base, {"decoding": "lossless"}, "adapter"),
        (model, {"jacobi_block_size": NUM_MASKS + 2}, "`jacobi_block_size`"),
        (model, {"jacobi_drafts": 0}, "`jacobi_drafts`"),
        (model, {"jacobi_drafts": True}, "`jacobi_drafts`"),
        (model, {"jacobi_drafts": 2, "decoding": "jacobi"}, "`jacobi_drafts`"),
        (base, {"jacobi_drafts": 2}, "`jacobi_drafts`"),
        (model, {"jacobi_drafts": 2, "decoding": "autoregressive"}, "`jacobi_drafts`"),
        (model, {"use_cache": False}, "`use_cache=False`"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(used, prompts, **options)


@pytest.mark.parametrize("name", ["mamba", "bloom", "bart", "gpt_neo", "qwen3_next", "openai-gpt", "llama4_text"])
def test_models_that_take_no_tree_are_refused_with_the_reason(name):
    linear = {"mamba": ["x_proj"], "qwen3_next": ["q_proj", "k_proj"]}
    model = add_random_adapter(make_architecture(name), target_modules=linear.get(name))
    with pytest.raises(ValueError, match="lossless"):
        generate(model.get_base_model(), make_prompts(1))


@pytest.mark.parametrize("where", ["masks", "lora_B", "following"])
def test_numbers_that_are_not_finite_are_refused(where):
    """They would get into the base model's rows: attention multiplies what it does not see by 0."""
    base, _ = pair_of("llama")
    for value in (torch.nan, torch.inf):
        model = add_random_adapter(base)
        model.get_base_model().generation_config.eos_token_id = 0  # the best of logits that are no numbers
        for name, weight in model.named_parameters():
            if where in name:
                weight.data.flatten()[0] = value
        try:
            found = generate(model, make_prompts(2))
        except ValueError as error:
            assert "must draft with finite numbers" in str(error)
        else:
            # A Markov head takes part in nothing but the choice of the draft.
            assert where == "following" and torch.equal(found.sequences, generate(base, make_prompts(2)).sequences)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [3, 1])
def test_one_graph_serves_all_calls(graphs, batch_size):  # noqa: F811
    base = make_model("llama", num_hidden_layers=1)
    model, options = add_random_adapter(base), {"jacobi_compile": True, "jacobi_block_size": 5}
    for length, seed in ((9, 0), (6, 1), (20, 2)):
        prompts = make_prompts(batch_size, length, seed)
        greedy = generate(base, prompts).sequences
        with knowing(greedy.tolist()):
            output = generate(model, prompts, **options)
        assert torch.equal(output.sequences, greedy)
    assert len(graphs) == 1 and output.jacobi_stats.tokens_per_forward > 1.2


@pytest.mark.slow
def test_a_compiled_drafter_drafts_the_same(graphs, counting):  # noqa: F811
    base, model = counting
    ids = cycle_text(torch.tensor([[3]]), 5)
    plain, compiled = (
        generate(model, (ids, torch.ones_like(ids)), max_new_tokens=30, jacobi_block_size=7, **options)
        for options in ({}, {"jacobi_compile": True})
    )
    assert graphs and torch.equal(plain.sequences, compiled.sequences)
    assert abs(plain.jacobi_stats.num_forwards - compiled.jacobi_stats.num_forwards) <= 1


@pytest.mark.slow
def test_a_static_cache_has_room_for_the_masks_after_the_last_token(graphs):  # noqa: F811
    """Its length is rounded up to 256: here to no more than the text and a block of tokens take."""
    base = make_model("llama", num_hidden_layers=1, max_position_embeddings=512)
    model, prompts = add_random_adapter(base), make_prompts(1)
    greedy = generate(base, prompts, max_new_tokens=240).sequences
    for drafts in (1, 99):
        output = generate(
            model, prompts, max_new_tokens=240, jacobi_compile=True, jacobi_block_size=7, jacobi_drafts=drafts
        )
        assert torch.equal(output.sequences, greedy)


@pytest.mark.slow
def test_the_real_compiler():
    torch._dynamo.reset()
    for length in (9, 14):
        prompts = make_prompts(1, length)
        greedy = generate(pair_of("llama")[0], prompts).sequences
        output = generate(pair_of("llama")[1], prompts, jacobi_compile=True, jacobi_block_size=5)
        assert torch.equal(output.sequences, greedy)
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.bfloat16, SLOW(torch.float16)])
@pytest.mark.parametrize("name", ["gemma3", SLOW("llama"), SLOW("gpt2")])
def test_in_16_bits_texts_part_at_near_ties_alone(name, dtype):
    base = make_model(name, scale=2.0).to(dtype)
    model = add_random_adapter(base, size=0.2)
    for seed in range(3):
        prompts = make_prompts(3, seed=seed, padding=False)
        greedy = generate(base, prompts).sequences
        with knowing(greedy.tolist()):
            decoded = generate(model, prompts).sequences
        for ours, theirs in zip(decoded, greedy):
            apart = (ours != theirs).nonzero()
            if len(apart):
                place = apart[0].item()
                with torch.no_grad():
                    logits = base(theirs[None, :place]).logits[0, -1:]
                assert ours[place] == logits.argmax() or judge_greedy(logits, ours[place, None], dtype)[1].item()
