"""A strategy that reads is given the hidden states of the text, whatever it proposes; no other one costs a hook."""

import copy
import pickle

import pytest
import torch
from architectures import make_architecture
from conftest import make_model, make_prompts
from test_compiled import graphs  # noqa: F401  # a fixture
from test_strategies import RandomTrees, generate, register  # noqa: F401  # a fixture

from cllm_hf import Proposal


class Reads(RandomTrees):
    """Trees as those, and what was read of each row."""

    def __init__(self, texts, seed=0):
        super().__init__(texts, seed)
        self.read_states, self.rows = {}, {}

    def read(self, row, hidden_states):
        self.rows[row.index] = row
        self.read_states.setdefault(row.index, []).append((len(row.text) - 1, hidden_states))


class ReadsChains(Reads):
    needs_tree = False

    def tree(self, row, room):
        rest = self.texts[row.index][len(row.text) :] + [5] * 99
        return Proposal([row.anchor, *rest[: self.random.randrange(room.depth + 1)], 7][: room.depth + 1])


def texts_of(model, prompts):
    sequences = generate(model, prompts).sequences
    return sequences, [row[mask.bool().tolist().index(True) :].tolist() for row, mask in zip(sequences, prompts[1])]


@torch.no_grad()
def check_read(model, strategy):
    """Each call has the states of the text as far as it had come, by a plain forward pass over it."""
    for index, calls in strategy.read_states.items():
        text = strategy.rows[index].text
        expected = model.get_decoder()(torch.tensor([text]), use_cache=False)[0][0]
        assert len(calls) > 2
        for end, states in calls:
            assert torch.allclose(states, expected[end - len(states) : end], atol=1e-4)


@pytest.mark.parametrize("kind", [Reads, ReadsChains])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_what_is_read_are_the_states_of_the_text(register, kind, batch_size):  # noqa: F811
    for name in ("llama", "gemma3"):
        model, prompts = make_model(name), make_prompts(batch_size)
        greedy, texts = texts_of(model, prompts)
        strategy = register(kind(texts))
        output = generate(model, prompts, decoding="test", jacobi_block_size=8)
        assert torch.equal(output.sequences, greedy)
        check_read(model, strategy)
        for calls in strategy.read_states.values():  # every token once
            ends = [end for end, _ in calls]
            assert [len(states) for _, states in calls] == [ends[0], *(b - a for a, b in zip(ends, ends[1:]))]


@pytest.mark.parametrize(
    "options", [{"use_cache": False}, {"eos_token_id": [20, 30, 40]}, {"repetition_penalty": 1.3}]
)
def test_other_ways_to_feed_and_to_verify(register, llama, options):  # noqa: F811
    prompts = make_prompts(2)
    greedy = generate(llama, prompts, **options).sequences
    strategy = register(ReadsChains(greedy.tolist()))
    assert torch.equal(generate(llama, prompts, decoding="test", jacobi_block_size=8, **options).sequences, greedy)
    for index, calls in strategy.read_states.items():
        expected = llama.get_decoder()(torch.tensor([strategy.rows[index].text]))[0][0]
        assert all(torch.allclose(states, expected[end - len(states) : end], atol=1e-4) for end, states in calls)


def test_recurrent_states_and_prompts_of_embeddings(register, llama):  # noqa: F811
    prompts = make_prompts(1)
    model = make_architecture("mamba2")
    strategy = register(ReadsChains(texts_of(model, prompts)[1]))
    generate(model, prompts, decoding="test", jacobi_block_size=4, max_new_tokens=12)
    check_read(model, strategy)
    embeds = llama.get_input_embeddings()(prompts[0])
    strategy = register(ReadsChains([[5] * 99]))
    llama.generate(inputs_embeds=embeds, decoding="test", jacobi_block_size=4, do_sample=False, max_new_tokens=6)
    assert strategy.read_states[0][0][1].shape == (1, 32)


def test_the_hook_goes_whatever_ends_the_call(register, llama):  # noqa: F811
    class Fails(ReadsChains):
        def read(self, row, hidden_states):
            raise KeyboardInterrupt

    register(Fails([[5] * 99]))
    with pytest.raises(KeyboardInterrupt):
        generate(llama, make_prompts(1), decoding="test", jacobi_block_size=4)
    assert not llama.model._forward_hooks
    register(ReadsChains([[5] * 99]))
    generate(llama, make_prompts(1), decoding="test", jacobi_block_size=4)
    assert not llama.model._forward_hooks
    llama.lm_head.register_forward_hook(lambda *arguments: pytest.fail("the model failed"))
    with pytest.raises(pytest.fail.Exception):
        generate(llama, make_prompts(1), decoding="test", jacobi_block_size=4)
    assert not llama.model._forward_hooks


def test_no_hook_for_a_strategy_that_does_not_read(register, llama):  # noqa: F811
    class DoesNot(RandomTrees):
        def propose(self, rows, room):
            return [Proposal([row.anchor]) for row in rows]

    def hook(*arguments):
        found.append(len(llama.model._forward_hooks))

    found = []
    llama.lm_head.register_forward_hook(hook)
    for strategy in (DoesNot([]), ReadsChains([[5] * 99])):
        register(strategy)
        generate(llama, make_prompts(1), decoding="test", jacobi_block_size=4, max_new_tokens=2)
    assert found[0] == 0 and found[-1] == 1


@pytest.mark.parametrize("batch_size", [1, 3])
def test_compiled_iterations_are_read_in_graphs_of_their_own(register, graphs, llama, batch_size):  # noqa: F811
    compiled = {"jacobi_compile": True, "jacobi_block_size": 5}
    for seed in range(2):
        prompts = make_prompts(batch_size, seed=seed)
        greedy, texts = texts_of(llama, prompts)
        generate(llama, prompts, **compiled)
        strategy = register(ReadsChains(texts))
        assert torch.equal(generate(llama, prompts, decoding="test", **compiled).sequences, greedy)
        check_read(llama, strategy)
    assert len(graphs) == 2
    assert not llama.model._forward_hooks
    options = {"eos_token_id": greedy[:, 14].tolist()}  # rows leave one after the other
    expected = generate(llama, prompts, **options).sequences
    strategy = register(ReadsChains(texts))
    assert torch.equal(generate(llama, prompts, decoding="test", **compiled, **options).sequences, expected)
    check_read(llama, strategy)


def test_a_copy_of_a_model_has_a_reader_of_its_own(register, llama):  # noqa: F811
    register(ReadsChains([[5] * 99]))
    generate(llama, make_prompts(1), decoding="test", jacobi_block_size=4)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(llama)))
    with torch.no_grad():
        copied.model.norm.weight.mul_(2)
    strategy = register(ReadsChains([[5] * 99]))
    generate(copied, make_prompts(1), decoding="test", jacobi_block_size=4)
    check_read(copied, strategy)
