"""Iterations of fixed shape on a static cache, compiled."""

import copy
import logging
import pickle

import pytest
import torch
from architectures import KINDS, make_architecture
from conftest import make_model, make_prompts
from transformers import DynamicCache, GenerationConfig, T5Config, T5ForConditionalGeneration

import cllm_hf  # noqa: F401
from cllm_hf.decoding import compiled, loop, memory_choice
from cllm_hf.options import JacobiOptions


@pytest.fixture
def graphs(monkeypatch):
    """Has `torch.compile` run what it captures as it is, and lists what it captured."""
    captured = []

    def backend(graph_module, example_inputs):
        captured.append([tuple(value.shape) for value in example_inputs if isinstance(value, torch.Tensor)])
        return graph_module.forward

    torch._dynamo.reset()
    compile_with = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda call, **options: compile_with(call, backend=backend, fullgraph=True, dynamic=False)
    )
    yield captured
    torch._dynamo.reset()


def assert_equal_to_greedy(model, input_ids, mask, block_size=8, **options):
    options = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 24, **options}
    jacobi = {"jacobi_compile": True, "jacobi_block_size": block_size, "return_dict_in_generate": True}
    greedy = model.generate(input_ids, **options)
    output = model.generate(input_ids, **options, **jacobi)
    assert output.sequences.tolist() == greedy.tolist()
    assert output.jacobi_stats.num_forwards <= max(output.jacobi_stats.num_generated)
    return output


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_one_graph_for_all_calls(graphs, name, batch_size):
    model = make_model(name)
    for length, seed in ((9, 0), (6, 1), (20, 2), (9, 3)):
        output = assert_equal_to_greedy(model, *make_prompts(batch_size, length, seed))
    assert len(graphs) == 1
    assert output.jacobi_stats.num_forwards > 2
    # A graph that a second call shares is one of another model or block size only.
    assert_equal_to_greedy(model, *make_prompts(batch_size, 9), block_size=5)
    assert len(graphs) == 2


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_has_graphs_of_its_own(graphs, llama, duplicate):
    prompts = make_prompts(1)
    assert_equal_to_greedy(llama, *prompts)
    other = duplicate(llama)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(parameter.flip(0))
    ours = assert_equal_to_greedy(other, *prompts)
    assert ours.sequences.tolist() != assert_equal_to_greedy(llama, *prompts).sequences.tolist()


@pytest.mark.parametrize("batch_size", [1, 3])
def test_stop_tokens_processors_and_samples(graphs, llama, batch_size):
    input_ids, mask = make_prompts(batch_size)
    greedy = llama.generate(input_ids, attention_mask=mask, do_sample=False, max_new_tokens=24)
    assert_equal_to_greedy(llama, input_ids, mask, eos_token_id=greedy[:, 14].tolist())
    assert_equal_to_greedy(llama, input_ids, mask, eos_token_id=greedy[:, 12].tolist(), repetition_penalty=1.3)
    assert_equal_to_greedy(llama, input_ids, mask, eos_token_id=greedy[0, 9].item())
    samples = [
        llama.generate(
            input_ids,
            attention_mask=mask,
            do_sample=True,
            max_new_tokens=24,
            jacobi_seed=4,
            jacobi_block_size=8,
            **extra,
        ).tolist()
        for extra in ({}, {"cache_implementation": "static"})
    ]
    assert samples[0] == samples[1]
    assert len(graphs) == 1


def test_no_position_beyond_the_last_one_is_used(graphs):
    """The learned positions of this model end where the text does."""
    model = make_model("gpt2", n_positions=64)
    assert_equal_to_greedy(model, *make_prompts(1), 16, max_new_tokens=None, max_length=64)


def test_models_that_cannot_be_compiled_go_without(graphs, caplog):
    logging.getLogger("transformers").propagate = True
    input_ids, mask = make_prompts(1)
    with caplog.at_level(logging.WARNING):
        assert_equal_to_greedy(make_architecture("bloom").eval(), input_ids, mask)
    assert "BloomForCausalLM decodes by Jacobi without being compiled: its masks" in caplog.text
    llama = make_model("llama")
    cache = DynamicCache(config=llama.config)
    options = {"past_key_values": cache, "do_sample": False, "max_new_tokens": 8}
    llama.generate(input_ids, **options, jacobi_compile=True)
    config = T5Config(
        vocab_size=60,
        d_model=16,
        d_kv=8,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
        eos_token_id=None,
    )
    assert_equal_to_greedy(T5ForConditionalGeneration(config).eval(), input_ids, mask, cache_implementation=None)
    assert not graphs


def test_one_row_with_padding(graphs, llama):
    ids = torch.tensor([[0, 0, 0, 5, 9, 33, 21, 8, 40]])
    assert_equal_to_greedy(llama, ids, (ids > 0).long())


def test_auto_is_one_block_size(graphs, llama):
    assert_equal_to_greedy(llama, *make_prompts(1), "auto")
    assert_equal_to_greedy(llama, *make_prompts(1), None)
    assert [shapes for shapes in graphs if (1, 16) in shapes] == graphs and len(graphs) == 1


@pytest.fixture
def plain_step(monkeypatch):
    """Has the model run as it is where it would be compiled."""
    monkeypatch.setattr(torch, "compile", lambda call, **options: call)


@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral"])
def test_rows_go_on_at_their_own_pace(plain_step, name):
    """Windows are those of the mask, and a row that ends leaves its place empty."""
    model = make_model(name)
    input_ids, mask = make_prompts(4)
    greedy = model.generate(input_ids, attention_mask=mask, do_sample=False, max_new_tokens=24)
    stops = greedy[:2, 15].tolist()
    for options in ({}, {"eos_token_id": stops, "pad_token_id": 0}):
        output = assert_equal_to_greedy(model, input_ids, mask, **options)
        dynamic = model.generate(
            input_ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=24,
            jacobi_block_size=8,
            return_dict_in_generate=True,
            **options,
        )
        # Its last drafts are not cut to what is left of the foremost row.
        assert output.jacobi_stats.num_forwards <= dynamic.jacobi_stats.num_forwards
    assert len({len(row) for row in output.jacobi_stats.num_committed}) > 1


@pytest.mark.slow
@pytest.mark.parametrize("model_type", KINDS)
def test_every_kind_that_can_be_compiled(plain_step, monkeypatch, model_type):
    model = make_architecture(model_type).eval()
    made, make_static = [], memory_choice.make_static
    monkeypatch.setattr(memory_choice, "make_static", lambda *options: made.append(make_static(*options)) or made[-1])
    input_ids, mask = make_prompts(3, 12)
    options = {"do_sample": False, "max_new_tokens": 30, "pad_token_id": 0, "eos_token_id": [40, 41, 42]}
    options |= {"attention_mask": mask}
    output = model.generate(input_ids, **options, jacobi_compile=True, jacobi_block_size=6)
    assert any(made)
    assert output.tolist() == model.generate(input_ids, **options).tolist()


def test_the_cache_goes_on_elsewhere(plain_step, llama):
    input_ids, _ = make_prompts(1)
    options = {"do_sample": False, "return_dict_in_generate": True}
    first = llama.generate(input_ids, **options, max_new_tokens=9, jacobi_compile=True)
    rest = llama.generate(first.sequences, **options, max_new_tokens=15, past_key_values=first.past_key_values)
    whole = llama.generate(input_ids, do_sample=False, max_new_tokens=24)
    assert rest.sequences.tolist() == whole.tolist()


def test_on_a_gpu_it_is_the_default(monkeypatch, llama):
    """What a GPU would do; there is none here."""
    device, config = torch.device("cuda"), GenerationConfig()
    assert not loop._choose_compiling(device, JacobiOptions(), config).is_asked
    assert loop._choose_compiling(torch.device("cpu"), JacobiOptions(), config) is None
    assert loop._choose_compiling(device, JacobiOptions(compile=False), config) is None
    assert loop._choose_compiling(device, JacobiOptions(candidates=2), config) is None
    assert loop._choose_compiling(device, JacobiOptions(), GenerationConfig(disable_compile=True)) is None
    assert loop._choose_compiling(device, JacobiOptions(compile=True), config).is_asked


def test_a_default_says_what_it_does_and_falls_back(monkeypatch, llama, caplog):
    choose = loop._choose_compiling
    monkeypatch.setattr(loop, "_choose_compiling", lambda device, *others: choose(torch.device("cuda"), *others))
    logging.getLogger("transformers").propagate = True
    monkeypatch.setattr(torch, "compile", lambda call, **options: call)
    options = {"do_sample": False, "max_new_tokens": 24}
    greedy = llama.generate(make_prompts(1)[0], **options).tolist()
    with caplog.at_level(logging.WARNING):
        assert llama.generate(make_prompts(1)[0], **options, decoding="jacobi").tolist() == greedy
        assert "LlamaForCausalLM is compiled for Jacobi decoding of 1 x 16 tokens, once." in caplog.text
        assert "Compiled in 0 s." in caplog.text
        caplog.clear()
        assert llama.generate(make_prompts(1)[0], **options, decoding="jacobi").tolist() == greedy
        assert not caplog.text  # said once

        def fail(**inputs):
            raise RuntimeError("no compiler here\nand more")

        del vars(llama)[compiled._GRAPHS]
        monkeypatch.setattr(torch, "compile", lambda call, **options: fail)
        assert llama.generate(make_prompts(1)[0], **options, jacobi_block_size=5).tolist() == greedy
        assert "without being compiled: no compiler here" in caplog.text
        caplog.clear()
        assert llama.generate(make_prompts(1)[0], **options, jacobi_block_size=5).tolist() == greedy
        assert not caplog.text  # it is not tried again unasked
        del vars(llama)[compiled._FAILED]
        # Memory that a long text or a large batch would take is not taken unasked.
        caplog.clear()
        options |= {"max_new_tokens": 9000, "eos_token_id": greedy[0][-1]}
        long = llama.generate(make_prompts(1)[0], **options, jacobi_block_size=6)
    assert long.tolist() == llama.generate(make_prompts(1)[0], **options).tolist() and not caplog.text


@pytest.mark.slow
def test_the_real_compiler(llama):
    torch._dynamo.reset()
    for length in (9, 14):
        assert_equal_to_greedy(llama, *make_prompts(1, length))
