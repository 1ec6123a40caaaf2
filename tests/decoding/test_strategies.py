"""Whatever a strategy proposes, the text is that of greedy decoding; what it is told is what the model says."""

import random
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_model, make_prompts
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

import cllm_hf
from cllm_hf import Proposal, register_strategy
from cllm_hf.decoding import strategy as strategy_module
from cllm_hf.decoding.strategy import Room, check_proposals, level


@pytest.fixture
def register(monkeypatch):
    """Register a strategy for one test."""
    monkeypatch.setattr(strategy_module, "_FACTORIES", dict(strategy_module._FACTORIES))

    def add(strategy):
        register_strategy("test", lambda options: strategy)
        return strategy

    return add


def generate(model, prompts, **options):
    input_ids, mask = prompts
    return model.generate(
        input_ids,
        attention_mask=mask,
        **{"do_sample": False, "max_new_tokens": 30, "return_dict_in_generate": True, **options},
    )


class RandomTrees:
    """Random trees of likely tokens, of any size, with places for the drafter alone."""

    needs_tree = True

    def __init__(self, texts, seed=0):
        self.texts = texts  # of each row, to make guesses that are often right
        self.random = random.Random(seed)
        self.proposals, self.told = {}, []

    def propose(self, rows, room):
        return [self.note(row, self.tree(row, room)) for row in rows]

    def note(self, row, proposal):
        self.proposals[row.index] = (list(row.text), proposal)
        return proposal

    def tree(self, row, room):
        rest = self.texts[row.index][len(row.text) :] + [5] * 99
        tokens, parents, depths, flags = [row.anchor], [-1], [0], [False]
        for _ in range(self.random.randrange(12)):
            parent = (
                len(tokens) - 1
                if self.random.random() < 0.6 or not room.is_tree
                else self.random.randrange(len(tokens))
            )
            token = rest[depths[parent]] if self.random.random() < 0.7 else self.random.randrange(3, 60)
            if depths[parent] == room.depth or (parent, token) in zip(parents, tokens):
                continue
            tokens.append(token)
            parents.append(parent)
            depths.append(depths[parent] + 1)
            flags.append(flags[parent] or (room.is_tree and self.random.random() < 0.1))
        return Proposal(tokens, parents, flags) if room.is_tree else Proposal(tokens)

    def observe(self, row, path, predictions):
        text, proposal = self.proposals.pop(row.index, (None, None))
        if proposal is not None:
            self.told.append((text, proposal, path, predictions))


@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral", "gpt2"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_any_tree_gives_the_greedy_text(register, name, batch_size):
    model, prompts = make_model(name), make_prompts(batch_size)
    greedy = generate(model, prompts).sequences
    texts = [row[mask.bool().tolist().index(True) :].tolist() for row, mask in zip(greedy, prompts[1])]
    for seed in range(4):
        strategy = register(RandomTrees(texts, seed))
        output = generate(model, prompts, decoding="test", jacobi_block_size=8)
        assert torch.equal(output.sequences, greedy)
        assert output.jacobi_stats.tokens_per_forward > 1.5
        lengths = [len(path) for _, _, path, _ in strategy.told]
        assert min(lengths) == 1 and max(lengths) > 3


@torch.no_grad()
def test_a_strategy_is_told_what_the_model_says_after_each_place(register, llama):
    prompts = make_prompts(2)
    greedy = generate(llama, prompts).sequences
    texts = [row[mask.bool().tolist().index(True) :].tolist() for row, mask in zip(greedy, prompts[1])]
    strategy = register(RandomTrees(texts))
    generate(llama, prompts, decoding="test", jacobi_block_size=8)
    num_drafter = 0
    for text, proposal, path, predictions in strategy.told:
        parents = proposal.parents or list(range(-1, len(proposal.token_ids) - 1))
        for place in range(len(proposal.token_ids)):
            branch, ancestor = [], place
            while ancestor > 0:
                branch.insert(0, proposal.token_ids[ancestor])
                ancestor = parents[ancestor]
            logits = llama(torch.tensor([text + branch])).logits[0, -1]
            assert predictions[place] == logits.argmax()
        num_drafter += sum(proposal.is_drafter or [])
        assert not any((proposal.is_drafter or [False] * 99)[place] for place in path)
    assert num_drafter > 3


def test_rows_may_propose_different_numbers_of_tokens(register, llama):
    class Uneven:
        needs_tree = False

        def propose(self, rows, room):
            return [Proposal([row.anchor, *[7] * min(row.index, room.depth)]) for row in rows]

        def observe(self, row, path, predictions):
            assert len(path) <= len(predictions) == min(4, len(predictions))

    register(Uneven())
    prompts = make_prompts(4)
    output = generate(llama, prompts, decoding="test", jacobi_block_size=16)
    assert torch.equal(output.sequences, generate(llama, prompts).sequences)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_samples_and_processors_are_those_of_decoding_one_at_a_time(register, llama, batch_size):
    prompts = make_prompts(batch_size)
    for options in (
        {"do_sample": True, "temperature": 0.8, "jacobi_seed": 3},
        {"repetition_penalty": 1.4},
        {"eos_token_id": [20, 30, 40], "no_repeat_ngram_size": 2},
        {"do_sample": True, "top_p": 0.9, "repetition_penalty": 1.2, "jacobi_seed": 5, "eos_token_id": [20, 30]},
    ):
        expected = generate(llama, prompts, jacobi_block_size=1, **options).sequences
        texts = [row[mask.bool().tolist().index(True) :].tolist() for row, mask in zip(expected, prompts[1])]
        register(RandomTrees(texts))
        output = generate(llama, prompts, decoding="test", jacobi_block_size=8, **options)
        assert torch.equal(output.sequences, expected)
        assert output.jacobi_stats.tokens_per_forward > 1.3


def test_the_example_decodes_exactly_and_in_fewer_forward_passes(monkeypatch, register, llama):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    import own_strategy

    source = Path(own_strategy.__file__).read_text()
    assert len(source.splitlines()) < 60
    register(own_strategy.LastTwoTokens())
    prompts = make_prompts(3)
    output = generate(llama, prompts, decoding="test", jacobi_block_size=8, max_new_tokens=60)
    assert torch.equal(output.sequences, generate(llama, prompts, max_new_tokens=60).sequences)
    assert output.jacobi_stats.tokens_per_forward > 1.5
    sys.modules.pop("own_strategy")


@pytest.mark.parametrize(
    ("proposal", "message"),
    [
        (Proposal([]), "`row.anchor`"),
        (Proposal([2, 3]), "`row.anchor`"),
        (Proposal([1, 2, 3, 4, 5]), "room.depth=3"),
        (Proposal([1, 2, 3], [-1, 0]), "parent"),
        (Proposal([1, 2], [-1, 0], [False]), "`is_drafter`"),
        (Proposal([1, 2, 3], [-1, 2, 0]), "parents"),
        (Proposal([1, 2, 3], [-1, -1, 0]), "parents"),
        (Proposal([1, 2], [-1, 0], [True, True]), "drafter"),
        (Proposal([1, 2, 3], [-1, 0, 1], [False, True, False]), "drafter"),
        (Proposal([1, 2, 3, 4, 5], [-1, 0, 1, 2, 3]), "room.depth=3"),
    ],
)
def test_proposals_that_make_no_sense_are_refused(proposal, message):
    strategy = RandomTrees([])
    with pytest.raises(ValueError, match=message):
        check_proposals([proposal], [1], Room(3, is_tree=True), strategy)


def test_trees_are_refused_where_there_is_no_room_for_them():
    tree = Proposal([1, 2], [-1, 0])
    with pytest.raises(ValueError, match="`needs_tree = True`"):
        check_proposals([tree], [1], Room(3, is_tree=False), RandomTrees([]))
    with pytest.raises(ValueError, match="2 proposals"):
        check_proposals([tree], [1, 1], Room(3, is_tree=True), RandomTrees([]))


def test_shorter_proposals_are_filled_up():
    assert [one.token_ids for one in level([Proposal([1]), Proposal([2, 3, 4])])] == [[1, 1, 1], [2, 3, 4]]
    short, long = level([Proposal([1, 2]), Proposal([1, 2, 3, 4], [-1, 0, 0, 1])])
    assert len(short.token_ids) == len(short.parents) == len(short.is_drafter) == 4
    assert short.is_drafter == [False, False, True, True]
    assert long.is_drafter == [False] * 4


def test_names_of_strategies(llama):
    with pytest.raises(ValueError, match="`name`"):
        register_strategy("jacobi", lambda options: RandomTrees([]))
    with pytest.raises(ValueError, match="`decoding`"):
        generate(llama, make_prompts(1), decoding="unknown")


def test_a_strategy_of_trees_is_refused_by_models_that_take_none(register):
    from architectures import make_architecture

    register(RandomTrees([]))
    for name in ("bloom", "mamba", "llama4_text"):
        with pytest.raises(ValueError, match="tree of tokens"):
            generate(make_architecture(name), make_prompts(1), decoding="test")


@pytest.mark.parametrize("options", [{"use_cache": False}, {"cache_implementation": "static"}])
def test_trees_without_a_dynamic_cache_are_refused_before_the_model_runs(register, llama, options):
    register(RandomTrees([]))
    llama.register_forward_pre_hook(lambda *args: pytest.fail("the model ran"))
    with pytest.raises(ValueError, match="`use_cache=False`"):
        generate(llama, make_prompts(1), decoding="test", jacobi_block_size=4, **options)


def test_a_chain_may_end_in_places_for_the_drafter(register, llama):
    class Chain(RandomTrees):
        def tree(self, row, room):
            rest = self.texts[row.index][len(row.text) :] + [5] * 99
            tokens = [row.anchor, *rest[: room.depth]]
            flags = [place > 2 for place in range(len(tokens))]
            return Proposal(tokens, is_drafter=flags) if room.is_tree else Proposal(tokens[:3])

    prompts = make_prompts(2, padding=False)
    greedy = generate(llama, prompts).sequences
    strategy = register(Chain(greedy.tolist()))
    output = generate(llama, prompts, decoding="test", jacobi_block_size=6)
    assert torch.equal(output.sequences, greedy)
    assert {len(path) for _, _, path, _ in strategy.told} == {3}


def test_options_are_those_of_the_strategy_that_a_generation_config_names(register, llama):
    strategy = register(RandomTrees([[5] * 99]))
    llama.generation_config.decoding = "test"
    prompts = make_prompts(1)

    def is_asked(**options):
        strategy.told.clear()
        llama.generate(prompts[0], **options)
        return bool(strategy.told)

    options = {"do_sample": False, "max_new_tokens": 9}
    assert is_asked(**options)
    assert is_asked(jacobi_block_size=4, **options)
    assert is_asked(generation_config=GenerationConfig(jacobi_block_size=4, **options))
    assert not is_asked(jacobi_block_size=4, decoding="jacobi", **options)
    assert not is_asked(decoding="autoregressive", **options)


def test_public_names():
    assert {"Proposal", "Room", "Row", "Strategy", "register_strategy"} <= set(cllm_hf.__all__)


class Always(RandomTrees):
    """The rest of the text, after which nothing is right."""

    def tree(self, row, room):
        assert not row.is_stopped
        rest = self.texts[row.index][len(row.text) :] + [5] * 99
        return Proposal([row.anchor, *rest[: room.depth]])

    def observe(self, row, path, predictions):
        text, _ = self.proposals.pop(row.index)
        assert not row.is_stopped and row.text == text + [predictions[place] for place in path]


def test_rows_that_have_ended_are_not_asked_and_hold_no_other_row_back(register, llama):
    """A criterion of the user's own keeps rows that have ended in the batch."""

    class EndsWith20(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return input_ids[:, -1] == 20

    prompts = make_prompts(2, padding=False)
    plain = generate(llama, prompts).sequences.tolist()
    options = {
        "stopping_criteria": StoppingCriteriaList([EndsWith20()]),
        "eos_token_id": next(token for token in plain[1][9:] if token not in plain[0][9:]),
        "pad_token_id": 0,
    }
    greedy = generate(llama, prompts, **options).sequences
    register(Always(plain))
    output = generate(llama, prompts, decoding="test", jacobi_block_size=8, **options)
    assert torch.equal(output.sequences, greedy)
    assert output.jacobi_stats.num_generated[1] < 0.5 * output.jacobi_stats.num_generated[0]
    # The prefill ends with the second row's text at most, all others commit a whole block each.
    assert output.jacobi_stats.num_forwards <= 2 + 30 // 8
