"""Iterations of fixed shape on a static cache, compiled."""

import logging

import pytest
import torch
from conftest import make_model, make_prompts
from transformers import DynamicCache, T5Config, T5ForConditionalGeneration

import cllm_hf  # noqa: F401


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
    compiled = {"jacobi_compile": True, "jacobi_block_size": block_size, "return_dict_in_generate": True}
    greedy = model.generate(input_ids, **options)
    output = model.generate(input_ids, **options, **compiled)
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
        assert_equal_to_greedy(make_model("gemma3"), input_ids, mask)
    assert "cannot be taken out of StaticSlidingWindowLayer" in caplog.text
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


def test_a_block_size_that_changes_is_refused(llama):
    with pytest.raises(ValueError, match="`jacobi_block_size`"):
        llama.generate(make_prompts(1)[0], jacobi_compile=True, jacobi_block_size="auto")


@pytest.mark.slow
def test_the_real_compiler(llama):
    torch._dynamo.reset()
    for length in (9, 14):
        assert_equal_to_greedy(llama, *make_prompts(1, length))
