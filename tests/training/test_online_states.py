"""States made while training: what the decoder's own window holds, by plain forward passes and lists."""

import pytest
import torch
from conftest import CONFIGS, make_model
from peft import LoraConfig, get_peft_model
from training_cases import make_record, make_records

from cllm_hf.blocks.rules import count_accepted, next_draft
from cllm_hf.training import states
from cllm_hf.training.batch import TrajectoryCollator
from cllm_hf.training.states import make_online_states


BLOCK_SIZE = 4
NOTHING = -1  # equal to no token


def collate(records):
    return TrajectoryCollator(None, with_states=False).collate(records)


def make_draws(num_rows=3, num_windows=6, block_size=BLOCK_SIZE, seed=0):
    return torch.rand(num_rows, num_windows, 1 + block_size, generator=torch.Generator().manual_seed(seed))


def predict(model, context, draft):
    """The model's token after the context and after each token of the draft but the last."""
    with torch.no_grad():
        return model(torch.tensor([context + draft[:-1]])).logits[0, len(context) - 1 :].argmax(-1).tolist()


def slow_window(model, prompt, response, draw, num_iterations, decodes=False):
    """
    One window, one plain forward pass an iteration. With `decodes` it commits the model's own tokens, as decoding
    does.

    Returns the state, its offset, the next state, and how often the window began again.
    """
    filler = [prompt[int(one * len(prompt))] for one in draw[1:].tolist()]
    offset, state, restarts = int(draw[0] * len(response)), filler, 0
    committed = response[:offset]
    for iteration in range(num_iterations + 1):
        predicted = predict(model, prompt + committed, state)
        right = predicted if decodes else (response[offset:] + [NOTHING] * len(state))[: len(state)]
        num_committed = 1 + count_accepted(state[:-1], right)
        if iteration == num_iterations:
            return state, offset, right[:num_committed] + predicted[num_committed:], restarts
        committed, offset = committed + right[:num_committed], offset + num_committed
        state = next_draft(predicted[num_committed:], filler)
        if offset >= len(response):
            committed, offset, state, restarts = [], 0, filler, restarts + 1


def check_against_slow_windows(model, records, blocks, draws, num_iterations, decodes=False):
    restarts = 0
    assert blocks.mask.all()
    for row, record in enumerate(records):
        for window in range(draws.shape[1]):
            prompt, response = record["prompt_ids"], record["response_ids"]
            state, offset, successor, again = slow_window(
                model, prompt, response, draws[row, window], num_iterations, decodes
            )
            restarts += again
            assert blocks.offsets[row, window] == offset
            inside = min(len(response) - offset, len(state))  # what is behind the response means nothing
            assert blocks.states[row, window, :inside].tolist() == state[:inside]
            assert blocks.fixed_points[row, window].tolist() == (response[offset:] + [0] * len(state))[: len(state)]
            if blocks.successors is not None:
                assert blocks.successors[row, window, :inside].tolist() == successor[:inside]
    return restarts


@pytest.mark.parametrize("num_iterations", [0, 1, 3, 7])
@pytest.mark.parametrize("with_successors", [False, True])
def test_windows_move_as_slow_ones_do(llama, num_iterations, with_successors):
    records, draws = make_records(), make_draws()
    blocks = make_online_states(llama, llama, collate(records), draws, BLOCK_SIZE, num_iterations, with_successors)
    restarts = check_against_slow_windows(llama, records, blocks, draws, num_iterations)
    assert (blocks.successors is not None) == with_successors
    assert restarts > 6 if num_iterations == 7 else num_iterations or not restarts


@pytest.mark.parametrize("name", CONFIGS)
def test_windows_over_a_models_own_responses_are_those_of_its_decoding(name):
    """They are exactly right there, so that what is committed is what the decoder itself commits."""
    model, records = make_model(name), []
    for seed in range(3):
        record = make_record(5 + seed, 1, seed=seed)
        greedy = model.generate(torch.tensor([record["prompt_ids"]]), max_new_tokens=20 + seed, do_sample=False)
        records.append({**record, "response_ids": greedy[0, 5 + seed :].tolist()})
    draws, moved = make_draws(num_windows=3), 0
    draws[..., 0] /= 4  # far from the end
    start = make_online_states(model, model, collate(records), draws, BLOCK_SIZE, 0)
    for num_iterations in (1, 3):
        blocks = make_online_states(model, model, collate(records), draws, BLOCK_SIZE, num_iterations, True)
        assert check_against_slow_windows(model, records, blocks, draws, num_iterations, decodes=True) == 0
        moved += (blocks.offsets - start.offsets).sum()
    assert moved > 0


def test_windows_do_not_depend_on_their_batch(llama):
    records, draws = make_records(), make_draws()
    together = make_online_states(llama, llama, collate(records), draws, BLOCK_SIZE, 3, True)
    for row in range(3):
        alone = make_online_states(
            llama, llama, collate(records[row : row + 1]), draws[row : row + 1], BLOCK_SIZE, 3, True
        )
        for name in ("states", "offsets"):
            assert torch.equal(getattr(alone, name)[0], getattr(together, name)[row])


@pytest.mark.parametrize("with_successors", [False, True])
def test_a_window_longer_than_the_responses_holds_the_same_tokens(llama, with_successors):
    """So that noisy context, whose windows are many blocks long, need not run what lies after every response."""
    records, draws = make_records(), make_draws(block_size=40)
    batch = collate(records)
    longest = int(batch.response_lengths.max())
    long = make_online_states(llama, llama, batch, draws, 40, 3, with_successors)
    short = make_online_states(llama, llama, batch, draws[..., : 1 + longest], longest, 3, with_successors)
    assert torch.equal(long.offsets, short.offsets)
    inside = long.offsets[..., None] + torch.arange(longest) < batch.response_lengths[:, None, None]
    for name in ("states", "successors") if with_successors else ("states",):
        values = getattr(long, name)[..., :longest], getattr(short, name)
        assert torch.equal(values[0][inside], values[1][inside])


@pytest.mark.parametrize("training", [False, True])
def test_the_models_mode_is_restored_also_after_an_error(llama, monkeypatch, training):
    llama.train(training)
    make_online_states(llama, llama, collate(make_records()), make_draws(), BLOCK_SIZE, 2)
    assert llama.training == training and all(module.training == training for module in llama.modules())

    def fail(*_, **__):
        assert not llama.training
        raise RuntimeError("out of memory")

    monkeypatch.setattr(states, "packed_forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        make_online_states(llama, llama, collate(make_records()), make_draws(), BLOCK_SIZE, 2)
    assert llama.training == training


def test_dropout_and_gradient_checkpointing_change_nothing():
    records, draws = make_records(), make_draws()
    plain = make_model("gpt2")
    expected = make_online_states(plain, plain, collate(records), draws, BLOCK_SIZE, 3)
    model = make_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    blocks = make_online_states(model.train(), model, collate(records), draws, BLOCK_SIZE, 3)
    assert torch.equal(blocks.states, expected.states) and torch.equal(blocks.offsets, expected.offsets)
    assert model.training and model.is_gradient_checkpointing
    assert all(parameter.grad is None for parameter in model.parameters()) and not blocks.states.requires_grad


def test_an_adapter_makes_the_states(llama):
    records, draws = make_records(), make_draws()
    base = make_online_states(llama, llama, collate(records), draws, BLOCK_SIZE, 3)
    model = get_peft_model(
        llama, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", lora_dropout=0.5)
    )
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    blocks = make_online_states(model.train(), llama, collate(records), draws, BLOCK_SIZE, 3)
    assert not torch.equal(blocks.states, base.states)
    check_against_slow_windows(model.eval(), records, blocks, draws, 3)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_autocast(attention):
    """In bfloat16 near ties fall one way or the other, so nearly all windows are those of plain forward passes."""
    model, records, draws = make_model("llama", attention=attention), make_records(), make_draws(num_windows=10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        blocks = make_online_states(model, model, collate(records), draws, BLOCK_SIZE, 1)
        same = total = 0
        for row, record in enumerate(records):
            for window, draw in enumerate(draws[row]):
                state, offset, *_ = slow_window(model, record["prompt_ids"], record["response_ids"], draw, 1)
                assert blocks.offsets[row, window] == offset
                same += sum(a == b for a, b in zip(state, blocks.states[row, window].tolist()))
                total += BLOCK_SIZE
    assert same >= 0.9 * total


def test_extreme_draws_stay_in_the_prompt_and_the_response(llama):
    records = make_records()
    draws = torch.full((3, 2, 1 + BLOCK_SIZE), 1 - 2**-24)
    draws[:, 1] = 0.0
    blocks = make_online_states(llama, llama, collate(records), draws, BLOCK_SIZE, 0)
    for row, record in enumerate(records):
        assert blocks.offsets[row].tolist() == [len(record["response_ids"]) - 1, 0]
        assert blocks.states[row, 0].tolist() == [record["prompt_ids"][-1]] * BLOCK_SIZE
        assert blocks.states[row, 1].tolist() == [record["prompt_ids"][0]] * BLOCK_SIZE
