"""The one invariant: Jacobi decoding returns, token for token, what `generate(do_sample=False)` returns."""

import pytest
import torch
from conftest import CONFIGS, VOCAB_SIZE, make_model, make_prompts
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
)

import cllm_hf  # noqa: F401


BLOCK_SIZES = (1, 2, 5, 16, 64)


def assert_equal_to_greedy(model, input_ids, mask, block_size, **options):
    """Decode both ways and compare; Jacobi must not call the model more often either."""
    options = {"do_sample": False, "max_new_tokens": 24, **options}
    calls = []
    handle = model.register_forward_pre_hook(lambda *_: calls.append(1))
    greedy = model.generate(input_ids, attention_mask=mask, **options)
    num_greedy = len(calls)
    output = model.generate(
        input_ids,
        attention_mask=mask,
        decoding="jacobi",
        jacobi_block_size=block_size,
        return_dict_in_generate=True,
        **options,
    )
    handle.remove()
    assert output.sequences.tolist() == greedy.tolist()
    assert output.jacobi_stats.num_forwards == len(calls) - num_greedy <= num_greedy
    return output


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("name", CONFIGS)
def test_architectures_with_and_without_padding(name, block_size):
    model = make_model(name)
    for batch_size in (1, 4):
        for length in (1, 9, 20):
            output = assert_equal_to_greedy(model, *make_prompts(batch_size, length), block_size)
            for row, committed in enumerate(output.jacobi_stats.num_committed):
                assert sum(committed) == output.jacobi_stats.num_generated[row] == 24
                assert max(committed) <= block_size


@pytest.mark.parametrize("name", CONFIGS)
def test_these_models_accept_drafts(name):
    """Otherwise the other tests here would say little about what happens when drafts are accepted."""
    stats = assert_equal_to_greedy(make_model(name), *make_prompts(4), 8, max_new_tokens=64).jacobi_stats
    assert max(map(max, stats.num_accepted)) >= 1


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_stop_token_first_inside_and_at_the_edge_of_a_block(name, block_size):
    model = make_model(name)
    input_ids, mask = make_prompts(4)
    greedy = model.generate(input_ids, attention_mask=mask, do_sample=False, max_new_tokens=24)[
        :, input_ids.shape[1] :
    ]
    for place in (0, 1, 3, block_size - 1, block_size, 2 * block_size):
        if place < greedy.shape[1]:
            for batch_size in (1, 4):
                stop = greedy[0, place].item()
                assert_equal_to_greedy(model, input_ids[:batch_size], mask[:batch_size], block_size, eos_token_id=stop)
    assert_equal_to_greedy(model, input_ids, mask, block_size, eos_token_id=greedy[:, 5].tolist())


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_length_limits_that_cut_a_block(llama, block_size):
    input_ids, mask = make_prompts(4)
    for limit in ({"max_new_tokens": 1}, {"max_new_tokens": 7}, {"max_new_tokens": None, "max_length": 22}):
        assert_equal_to_greedy(llama, input_ids, mask, block_size, **limit)
    greedy = llama.generate(input_ids, attention_mask=mask, do_sample=False, max_new_tokens=24)
    for stop in (greedy[0, input_ids.shape[1]].item(), greedy[1, input_ids.shape[1] + 2].item()):
        assert_equal_to_greedy(llama, input_ids, mask, block_size, eos_token_id=stop, min_new_tokens=9)


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [[5], [7, 9]]},
        {"forced_eos_token_id": 3, "eos_token_id": 3},
        {"forced_bos_token_id": 4},
        {"suppress_tokens": list(range(10, 40))},
        {"begin_suppress_tokens": list(range(3, 50))},
        {"sequence_bias": {(11,): 5.0}},
        {"exponential_decay_length_penalty": (5, 1.5), "eos_token_id": 3},
        {"encoder_repetition_penalty": 1.5},
        {"prefix_allowed_tokens_fn": lambda row, ids: list(range(3 + row, 30 + row))},
    ],
    ids=lambda options: next(iter(options)),
)
def test_processors(llama, options, batch_size):
    for block_size in (2, 16):
        assert_equal_to_greedy(llama, *make_prompts(batch_size), block_size, **options)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_processor_that_keeps_a_cache_of_its_own(llama, batch_size):
    """Classifier-free guidance calls the model itself, once a token, and must be called in that order."""
    input_ids, _ = make_prompts(batch_size, padding=False)
    options = {"do_sample": False, "max_new_tokens": 24, "guidance_scale": 1.5}
    greedy = llama.generate(input_ids, **options)
    assert llama.generate(input_ids, jacobi_block_size=8, **options).tolist() == greedy.tolist()


class EveryThirdCall(LogitsProcessor):
    """Depends on how often it was called, and mixes the rows of a batch."""

    def __init__(self):
        self.calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        return scores.flip(-1) if self.calls % 3 == 0 else scores + scores.mean(0, keepdim=True)


class AtLength(StoppingCriteria):
    """Stops each row at a length of its own."""

    def __call__(self, input_ids, scores, **kwargs):
        rows = torch.arange(input_ids.shape[0])
        return input_ids.shape[1] >= 14 + 2 * rows


@pytest.mark.parametrize("with_criterion", [False, True])
@pytest.mark.parametrize("num_stop_ids", [0, 4])
@pytest.mark.parametrize("block_size", [2, 16])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_processors_and_criteria_of_the_user(llama, batch_size, block_size, num_stop_ids, with_criterion):
    input_ids, mask = make_prompts(batch_size)
    outputs = [
        llama.generate(
            input_ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=24,
            logits_processor=LogitsProcessorList([EveryThirdCall()]),
            stopping_criteria=StoppingCriteriaList([AtLength()]) if with_criterion else None,
            eos_token_id=list(range(30, 30 + num_stop_ids)) or None,
            return_dict_in_generate=True,
            **extra,
        )
        for extra in ({}, {"jacobi_block_size": block_size})
    ]
    assert outputs[0].sequences.tolist() == outputs[1].sequences.tolist()
    for row, length in enumerate(outputs[1].jacobi_stats.num_generated):
        assert (outputs[0].sequences[row, 9 + length :] == 0).all()


def test_allowed_tokens_are_asked_for_true_contexts_only(llama):
    """Rows of a batch are at different lengths; the user's function must not see what stands after a row's end."""
    input_ids, mask = make_prompts(4)
    contexts = []
    for extra in ({}, {"jacobi_block_size": 8}):
        seen = set()

        def allow(row, ids, seen=seen):
            seen.add((row, *ids.tolist()))
            return list(range(3 + row, 40 + row))

        llama.generate(
            input_ids, attention_mask=mask, do_sample=False, max_new_tokens=24, prefix_allowed_tokens_fn=allow, **extra
        )
        contexts.append(seen)
    assert contexts[0] == contexts[1]


@pytest.mark.parametrize("limit", [5, 9, 12])
def test_length_criterion_of_the_user(llama, limit):
    for batch_size in (1, 4):
        criteria = StoppingCriteriaList([MaxLengthCriteria(limit)])
        assert_equal_to_greedy(llama, *make_prompts(batch_size), 8, stopping_criteria=criteria)


def test_no_position_beyond_the_last_one_is_used():
    """The learned positions of this model end where the text does."""
    model = make_model("gpt2", n_positions=64)
    for batch_size in (1, 4):
        prompts = make_prompts(batch_size, padding=False)
        for block_size in (5, 16, 64):
            assert_equal_to_greedy(model, *prompts, block_size, max_new_tokens=None, max_length=64)


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_positions_that_depend_on_the_reach_of_a_forward(rope_type):
    parameters = {"rope_type": rope_type, "factor": 4.0, "rope_theta": 100.0}
    if rope_type == "longrope":
        factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": 32}
        parameters |= factors
    model = make_model("llama", max_position_embeddings=32, rope_parameters=parameters)
    assert_equal_to_greedy(model, *make_prompts(2), 8, max_new_tokens=23)
    with pytest.raises(ValueError, match=f"of type {rope_type} up to 32 positions, got 33"):
        model.generate(make_prompts(2)[0], decoding="jacobi", max_new_tokens=24)


def test_processor_of_the_user_is_called_once_a_length_in_a_batch(llama):
    class Lengths(LogitsProcessor):
        def __init__(self):
            self.shapes = []

        def __call__(self, input_ids, scores):
            self.shapes.append((tuple(input_ids.shape), tuple(scores.shape)))
            return scores

    input_ids, mask = make_prompts(4)
    seen = []
    for extra in ({}, {"jacobi_block_size": 16}):
        processor = Lengths()
        llama.generate(
            input_ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=12,
            logits_processor=LogitsProcessorList([processor]),
            **extra,
        )
        seen.append(processor.shapes)
    assert seen[0] == seen[1]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_stop_strings(byte_tokenizer, batch_size):
    model = make_model("llama", vocab_size=len(byte_tokenizer))
    texts = ["Once upon a time", "Mia has 7", "The"][:batch_size]
    inputs = byte_tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    options = {"do_sample": False, "max_new_tokens": 20}
    greedy = model.generate(**inputs, **options)
    stop_string = byte_tokenizer.decode(greedy[0, -9:-6])
    assert len(stop_string) > 1
    options |= {"stop_strings": [stop_string], "tokenizer": byte_tokenizer}
    for stop_token in (None, greedy[-1, -12].item()):
        expected = model.generate(**inputs, **options, eos_token_id=stop_token)
        assert batch_size > 1 or expected.shape[1] < greedy.shape[1]
        for block_size in (2, 16):
            decoded = model.generate(**inputs, **options, eos_token_id=stop_token, jacobi_block_size=block_size)
            assert decoded.tolist() == expected.tolist()


def test_stop_strings_in_a_generation_config(byte_tokenizer):
    model = make_model("llama", vocab_size=len(byte_tokenizer))
    inputs = byte_tokenizer("Once upon a time", return_tensors="pt")
    greedy = model.generate(**inputs, do_sample=False, max_new_tokens=20)
    config = GenerationConfig(stop_strings=byte_tokenizer.decode(greedy[0, -9:-6]), do_sample=False, max_new_tokens=20)
    expected = model.generate(**inputs, generation_config=config, tokenizer=byte_tokenizer)
    options = {"tokenizer": byte_tokenizer, "jacobi_block_size": 8}
    assert model.generate(**inputs, generation_config=config, **options).tolist() == expected.tolist()
    assert config.stop_strings is not None
    model.generation_config = config
    assert model.generate(**inputs, **options).tolist() == expected.tolist()


class Recorder:
    """A streamer that keeps what it is given."""

    def __init__(self):
        self.values, self.ended = [], False

    def put(self, value):
        self.values.append(value.tolist())

    def end(self):
        self.ended = True


@pytest.mark.parametrize("batch_size", [1, 4])
def test_streamer_gets_the_same_calls(llama, batch_size):
    input_ids, mask = make_prompts(batch_size)
    stop = llama.generate(input_ids, attention_mask=mask, do_sample=False, max_new_tokens=9)[0, -1].item()
    recorders = [Recorder(), Recorder()]
    for recorder, extra in zip(recorders, ({}, {"jacobi_block_size": 16})):
        llama.generate(
            input_ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=20,
            eos_token_id=stop,
            streamer=recorder,
            **extra,
        )
    assert recorders[0].values == recorders[1].values
    assert recorders[0].ended and recorders[1].ended


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("all_ids", [True, False])
def test_cache_of_the_user(name, all_ids):
    model = make_model(name)
    prompt, _ = make_prompts(1, 15)
    sequences = []
    for extra in ({}, {"jacobi_block_size": 8}):
        cache = DynamicCache(config=model.config)
        model(prompt[:, :11], past_key_values=cache)
        ids = prompt if all_ids else prompt[:, 11:]
        # A second turn goes on from the cache that the first has left behind.
        for _ in range(2):
            mask = torch.ones(
                (1, ids.shape[1] if all_ids else cache.get_seq_length() + ids.shape[1]), dtype=torch.long
            )
            output = model.generate(
                ids,
                attention_mask=mask,
                past_key_values=cache,
                do_sample=False,
                max_new_tokens=12,
                return_dict_in_generate=True,
                **extra,
            )
            assert output.past_key_values is cache
            ids = torch.cat([output.sequences, prompt[:, :3]], dim=1)
            ids = ids if all_ids else ids[:, -4:]
        sequences.append(output.sequences.tolist())
        assert cache.get_seq_length() == (output.sequences.shape[1] - 1 if all_ids else 11 + 4 + 11 + 4 + 11)
    assert sequences[0] == sequences[1]


def test_cache_of_the_user_in_a_batch_is_read_and_left_as_it_was(llama):
    prompt, mask = make_prompts(3, 15)
    expected = llama.generate(prompt, attention_mask=mask, do_sample=False, max_new_tokens=12)
    cache = DynamicCache(config=llama.config)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    llama(prompt[:, :11], attention_mask=mask[:, :11], position_ids=positions[:, :11], past_key_values=cache)
    decoded = llama.generate(
        prompt,
        attention_mask=mask,
        past_key_values=cache,
        do_sample=False,
        max_new_tokens=12,
        jacobi_block_size=8,
    )
    assert decoded.tolist() == expected.tolist()
    assert cache.get_seq_length() == 11


@pytest.mark.parametrize("batch_size", [1, 4])
def test_prompt_as_embeddings(llama, batch_size):
    input_ids, mask = make_prompts(batch_size)
    embeds = llama.get_input_embeddings()(input_ids)
    options = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 20}
    for given in ({"inputs_embeds": embeds}, {"inputs_embeds": embeds, "input_ids": input_ids}):
        greedy = llama.generate(**given, **options)
        decoded = llama.generate(**given, **options, jacobi_block_size=8)
        assert decoded.tolist() == greedy.tolist()


def test_row_of_padding_alone(llama):
    input_ids, mask = make_prompts(3)
    mask[1] = 0
    assert_equal_to_greedy(llama, input_ids, mask, 8)


def test_mask_with_holes(llama):
    input_ids, mask = make_prompts(3)
    mask[0, 4] = mask[2, 7] = 0
    assert_equal_to_greedy(llama, input_ids, mask, 8)


def test_model_without_position_ids():
    """Such a model counts cached tokens to find positions."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0,
        eos_token_id=None, max_position_embeddings=128, word_embed_proj_dim=32,
    )  # fmt: skip
    model = OPTForCausalLM(config).eval()
    for batch_size in (1, 4):
        assert_equal_to_greedy(model, *make_prompts(batch_size), 8)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(60))
def test_random_cases(seed):
    """Everything at once, drawn at random."""
    rng = torch.Generator().manual_seed(seed)

    def draw(*choices):
        return choices[int(torch.randint(len(choices), (), generator=rng))]

    model = make_model(draw(*CONFIGS), scale=draw(2.0, 4.0, 8.0), seed=seed)
    prompts = make_prompts(draw(1, 2, 3, 5), draw(1, 2, 7, 30), seed, padding=draw(True, False))
    options = {"max_new_tokens": draw(1, 5, 33, 60)}
    if draw(True, False):
        options["eos_token_id"] = torch.randint(3, VOCAB_SIZE, (draw(1, 6),), generator=rng).tolist()
    if draw(True, False, False):
        options["repetition_penalty"] = 1.3
    if draw(True, False, False):
        options["min_new_tokens"] = 4
    assert_equal_to_greedy(model, *prompts, draw(1, 2, 3, 7, 16, 40), **options)


def test_memory_follows_the_text_and_not_its_limit(llama):
    """With a processor of the text, sequences stand in a tensor that the processor sees."""
    input_ids, _ = make_prompts(1)
    options = {"do_sample": False, "repetition_penalty": 1.2, "stopping_criteria": StoppingCriteriaList([AtLength()])}
    greedy = llama.generate(input_ids, max_new_tokens=24, **options)
    output = llama.generate(input_ids, max_new_tokens=10**12, jacobi_block_size=8, **options)  # 8 TB, if allocated
    assert torch.equal(output, greedy)


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.2}, {"jacobi_compile": True}], ids=str)
def test_memory_follows_the_text_and_not_the_block_size(llama, options):
    """A forward pass over 5 * 10**7 tokens would take hundreds of gigabytes."""
    input_ids, _ = make_prompts(1)
    expected = llama.generate(
        input_ids, max_new_tokens=24, do_sample=False, repetition_penalty=options.get("repetition_penalty")
    )
    limits = {
        "max_new_tokens": 10**9,
        "jacobi_block_size": 5 * 10**7,
        "stopping_criteria": StoppingCriteriaList([AtLength()]),
    }
    output = llama.generate(input_ids, do_sample=False, **limits, **options)
    assert output.tolist() == expected[:, : output.shape[1]].tolist() and output.shape[1] > 10
