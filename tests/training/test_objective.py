"""The loss of a step: equal to plain forward passes, computed only where it is, chosen by seed, update and record."""

import copy

import pytest
import torch
from conftest import CONFIGS, make_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from training_cases import BLOCK_SIZE, gradients_of, make_record, prepare, reference_losses

from cllm_hf.training import objective as objective_module
from cllm_hf.training.losses import DIVERGENCES
from cllm_hf.training.states import position_weights


def make_records():
    """Responses of two blocks and a bit, of one token, and of three blocks and a bit."""
    shapes = ((6, 12), (3, 1), (4, 18))
    return [make_record(prompt, response, num_states=7) for prompt, response in shapes]


SETTINGS = {
    "global": {},
    "local": {"consistency": "local"},
    "online": {"trajectory_source": "online", "block_size": BLOCK_SIZE},
    "online local": {"trajectory_source": "online", "block_size": BLOCK_SIZE, "consistency": "local"},
    "several states": {"states_per_block": 3},
    "progressive": {"state_sampling": "progressive", "noise_window": 3, "states_per_block": 2},
    "progressive local": {"state_sampling": "progressive", "noise_window": 3, "consistency": "local"},
    "noisy": {"context": "noisy", "noise_window": 2},
    "noisy local": {"context": "noisy", "noise_window": 2, "consistency": "local"},
    "small blocks": {"block_size_schedule": [3]},
    "large blocks": {"block_size_schedule": [12], "states_per_block": 2},
    "ground truth": {"ar_labels": "ground_truth"},
    "label smoothing": {"ar_label_smoothing": 0.1},
    "decay": {"position_decay": 1.5},
    "temperature": {"divergence_temperature": 2.5},
    **{name: {"divergence": name} for name in DIVERGENCES},
    "all at once": {
        "trajectory_source": "online",
        "block_size_schedule": [7],
        "states_per_block": 2,
        "ar_labels": "ground_truth",
        "ar_label_smoothing": 0.2,
        "position_decay": 3.0,
        "divergence": "jensen_shannon",
        "divergence_temperature": 1.5,
    },
}
by_setting = pytest.mark.parametrize("setting", SETTINGS)


def check_against_plain_forwards(model, records, **options):
    prepared, objective = prepare(model, records, **options)
    sums = objective.sum_losses(model, model, prepared)
    consistency, ar, weight_sum, num_ar = reference_losses(model, prepared, objective)
    assert weight_sum > 4 and num_ar > 4
    torch.testing.assert_close(prepared.counts, torch.tensor([weight_sum, float(num_ar)]))
    torch.testing.assert_close(sums, torch.stack([consistency, ar]), rtol=1e-4, atol=1e-3)
    # The gradient of each loss alone, so that neither hides after the other.
    for loss, reference in zip(sums, (consistency, ar)):
        gradients, expected = (gradients_of(value / 10, model) for value in (loss, reference))
        for name, gradient in expected.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-4 * (1 + gradient.abs().max()))


@by_setting
def test_losses_and_gradients_are_those_of_plain_forwards(llama, setting):
    check_against_plain_forwards(llama, make_records(), **SETTINGS[setting])


@pytest.mark.parametrize("setting", ["several states", "all at once"])
@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "llama"])
def test_every_architecture(name, setting):
    check_against_plain_forwards(make_model(name), make_records(), **SETTINGS[setting])


@pytest.mark.parametrize("setting", ["several states", "online local", "decay"])
def test_parts_of_the_positions_add_up(llama, monkeypatch, setting):
    """Many positions are done a part at a time, and again in the backward pass."""
    prepared, objective = prepare(llama, make_records(), **SETTINGS[setting])
    name, sums, calls = objective.config.divergence, [], []
    divergence = DIVERGENCES[name]
    monkeypatch.setitem(DIVERGENCES, name, lambda *inputs: calls.append(len(inputs[0])) or divergence(*inputs))
    for at_once in (10_000, 3):
        monkeypatch.setattr(objective_module, "_POSITIONS_AT_ONCE_ON_CPU", at_once)
        sums.append(objective.sum_losses(llama, llama, prepared))
    assert len(calls) > 3 and max(calls[1:]) == 3 and sum(calls[1:]) == calls[0]
    torch.testing.assert_close(sums[1], sums[0])
    whole, in_parts = (gradients_of(one.sum(), llama) for one in sums)
    for name in whole:
        torch.testing.assert_close(in_parts[name], whole[name], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(objective.sum_losses(llama, llama, prepared), sums[0].detach())


@by_setting
def test_logits_are_computed_only_where_a_loss_is(llama, setting):
    prepared, objective = prepare(llama, make_records(), **SETTINGS[setting])
    rows = []
    handle = llama.lm_head.register_forward_hook(lambda module, inputs, output: rows.append(output.shape))
    objective.sum_losses(llama, llama, prepared)
    handle.remove()
    trained = int((prepared.weights > 0).sum())
    # Targets: all tokens of the responses, or those of the successors too.
    expected = sum(len(record["response_ids"]) for record in make_records()) + trained
    expected += trained * (prepared.blocks.successors is not None)
    expected += 0 if prepared.batch.label_lengths is None else int(prepared.batch.label_lengths.sum())
    assert [shape[:-1].numel() for shape in rows] == [expected]
    assert expected < prepared.batch.clean_ids.numel() + prepared.blocks.states.numel() * 2


@pytest.mark.parametrize("found", [lambda model: None, lambda model: model.get_input_embeddings()])
def test_models_whose_output_embeddings_are_not_called(llama, monkeypatch, found):
    prepared, objective = prepare(llama, make_records(), states_per_block=2)
    expected = objective.sum_losses(llama, llama, prepared)
    monkeypatch.setattr(llama, "get_output_embeddings", lambda: torch.nn.Linear(2, 2) if found(llama) else None)
    torch.testing.assert_close(objective.sum_losses(llama, llama, prepared), expected)


def test_no_hook_is_left_behind(llama, monkeypatch):
    prepared, objective = prepare(llama, make_records())
    objective.sum_losses(llama, llama, prepared)
    assert not llama.lm_head._forward_pre_hooks
    monkeypatch.setattr(llama.lm_head, "forward", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        objective.sum_losses(llama, llama, prepared)
    assert not llama.lm_head._forward_pre_hooks


@pytest.mark.parametrize("setting", ["global", "online"])
def test_an_adapter_and_a_trained_head(llama, setting):
    """The loss is that of the model with the adapter merged, and reaches the adapter and the head."""
    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"]
    )
    model = get_peft_model(copy.deepcopy(llama), config)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    base = model.get_base_model()
    prepared, objective = prepare(model, make_records(), base_model=base, **SETTINGS[setting])
    sums = objective.sum_losses(model.train(), base, prepared)
    gradients = gradients_of(sums.sum(), model)
    assert all(gradient.abs().sum() > 0 for gradient in gradients.values())
    assert {"lora" in name or "modules_to_save" in name for name in gradients} == {True}
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(objective.sum_losses(merged, merged, prepared), sums, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("setting", ["several states", "online local"])
def test_gradient_checkpointing_gives_the_same_gradients(setting):
    gradients = []
    for checkpoints in (False, True):
        model = make_model("llama")
        if checkpoints:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        prepared, objective = prepare(model.train(), make_records(), **SETTINGS[setting])
        gradients.append(gradients_of(objective.sum_losses(model, model, prepared).sum(), model))
    for name in gradients[0]:
        torch.testing.assert_close(gradients[1][name], gradients[0][name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
@given(data=st.data())
def test_random_cases(data):
    """Records, architecture and options of every kind at once, against plain forward passes."""
    draw = data.draw
    block_size = draw(st.integers(2, 6))
    lengths = draw(st.lists(st.tuples(st.integers(1, 8), st.integers(1, 20)), min_size=1, max_size=4))
    records = [
        make_record(prompt, response, seed, draw(st.integers(2, 6)), block_size, pad=draw(st.sampled_from([0, 7])))
        for seed, (prompt, response) in enumerate(lengths)
    ]
    options = {
        "divergence": draw(st.sampled_from(sorted(DIVERGENCES))),
        "divergence_temperature": draw(st.sampled_from([0.7, 1.0, 2.0])),
        "position_decay": draw(st.sampled_from([None, 2.0])),
        "states_per_block": draw(st.integers(1, 3)),
        "ar_labels": draw(st.sampled_from(["response", "ground_truth"])),
        "ar_label_smoothing": draw(st.sampled_from([0.0, 0.1])),
        "context": draw(st.sampled_from(["clean", "noisy"])),
        "noise_window": draw(st.integers(1, 5)),
        "consistency": draw(st.sampled_from(["global", "local"])),
        "trajectory_source": draw(st.sampled_from(["dataset", "online"])),
        "max_length": draw(st.sampled_from([None, 16])),
    }
    if options["trajectory_source"] == "online":
        options["context"] = "clean"
    if options["context"] == "noisy":
        options["position_decay"] = None  # the reference knows no blocks inside a window
    if options["trajectory_source"] == "dataset":
        options["state_sampling"] = draw(st.sampled_from(["uniform", "progressive"]))
    if options["consistency"] == "global" and draw(st.booleans()):
        options["block_size_schedule"] = draw(st.lists(st.integers(1, 12), min_size=1, max_size=3))
    model = make_model(draw(st.sampled_from(sorted(CONFIGS))))
    update, progress = draw(st.integers(0, 99)), draw(st.sampled_from([0.0, 0.5, 1.0]))
    prepared, objective = prepare(model, records, update, progress, block_size=block_size, **options)
    sums = objective.sum_losses(model, model, prepared)
    consistency, ar, weight_sum, num_ar = reference_losses(model, prepared, objective)
    torch.testing.assert_close(prepared.counts, torch.tensor([weight_sum, float(num_ar)]))
    torch.testing.assert_close(sums, torch.stack([torch.as_tensor(consistency), ar]), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("setting", ["several states", "online local"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_autocast_is_near_float32(setting, attention):
    model = make_model("llama", scale=1.0, attention=attention)
    prepared, objective = prepare(model, make_records(), **SETTINGS[setting])
    expected = objective.sum_losses(model, model, prepared)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sums = objective.sum_losses(model, model, prepared)
    assert sums.dtype == torch.float32
    torch.testing.assert_close(sums, expected, rtol=0.03, atol=0.03)
    assert all(gradient.isfinite().all() for gradient in gradients_of(sums.sum(), model).values())


NO_POSITION = {
    "responses of one token": [make_record(5, 1), make_record(3, 1, seed=1)],
    "all states right": [
        {**record, "states": [[block[-1]] for block in record["states"]]} for record in (make_record(5, 7),)
    ],
    "blocks of one token": [make_record(5, 4, block_size=1)],
}


@pytest.mark.parametrize("name", NO_POSITION)
@pytest.mark.parametrize("setting", ["global", "local", "ground truth", "progressive", "decay"])
def test_without_any_position_the_consistency_loss_is_0(llama, name, setting):
    prepared, objective = prepare(
        llama, NO_POSITION[name], block_size=1 if "blocks" in name else BLOCK_SIZE, **SETTINGS[setting]
    )
    assert prepared.counts[0] == 0 and prepared.counts[1] > 0
    sums = objective.sum_losses(llama, llama, prepared)
    assert sums[0] == 0 and sums[1] > 0
    assert not any(gradient.any() for gradient in gradients_of(sums[0], llama).values())
    assert all(gradient.isfinite().all() for gradient in gradients_of(sums[1], llama).values())


def contributions(prepared):
    """For each row what is trained: places, drafts, next states and weights, as far as they lie in the response."""
    blocks, rows = prepared.blocks, []
    for row, length in enumerate(prepared.batch.response_lengths.tolist()):
        entries = []
        for block in blocks.mask[row].nonzero()[:, 0].tolist():
            offset = int(blocks.offsets[row, block])
            inside = slice(0, max(min(length - offset, blocks.states.shape[-1]), 0))
            parts = [blocks.states, prepared.weights]
            parts += [] if blocks.successors is None else [blocks.successors]
            entries.append((offset, *(tuple(part[row, block, inside].tolist()) for part in parts)))
        rows.append(sorted(entries))
    return rows


@pytest.mark.parametrize("states_per_block", [1, 2])
def test_each_record_has_as_many_windows_as_it_has_blocks(llama, states_per_block):
    options = {"trajectory_source": "online", "block_size": BLOCK_SIZE, "states_per_block": states_per_block}
    prepared, _ = prepare(llama, make_records(), **options)
    assert prepared.blocks.mask.sum(-1).tolist() == [states_per_block * blocks for blocks in (3, 1, 4)]
    assert not prepared.weights[~prepared.blocks.mask].any()


@by_setting
def test_the_choice_for_a_record_does_not_depend_on_its_batch(llama, setting):
    """Nor on the order, on the padding by longer records, nor on the process that it is in."""
    records = [*make_records(), make_record(9, 24, seed=3)]
    together = contributions(prepare(llama, records, **SETTINGS[setting])[0])
    turned = contributions(prepare(llama, records[::-1], **SETTINGS[setting])[0])
    assert turned == together[::-1]
    for record, expected in zip(records, together):
        assert contributions(prepare(llama, [record], **SETTINGS[setting])[0]) == [expected]


@pytest.mark.parametrize("setting", ["global", "several states", "online", "noisy"])
def test_the_choice_follows_seed_and_update(llama, setting):
    def choose(**changes):
        return contributions(prepare(llama, make_records(), **{**SETTINGS[setting], **changes})[0])

    assert choose(update=3, seed=5) == choose(update=3, seed=5)
    assert choose(update=3, seed=5) != choose(update=4, seed=5)
    assert choose(update=3, seed=5) != choose(update=3, seed=6)
    # `data_seed`, where it is given, is the seed of the data.
    assert choose(update=3, seed=5) == choose(update=3, seed=9, data_seed=5)


def test_over_many_updates_every_state_is_chosen_equally_often(llama):
    record = make_record(6, 5, num_states=5)
    wanted = [tuple(state) for state in record["states"][0][:-1]]
    chosen = [contributions(prepare(llama, [record], update=update)[0])[0][0][1] for update in range(200)]
    assert set(chosen) == set(wanted)
    for state in set(wanted):
        assert chosen.count(state) > 200 / len(wanted) * 0.6 * wanted.count(state)


def test_over_many_updates_online_states_are_of_every_number_of_iterations(llama, monkeypatch):
    seen, make = [], objective_module.make_online_states
    monkeypatch.setattr(objective_module, "make_online_states", lambda *rest: seen.append(rest[5]) or make(*rest))
    for update in range(30):
        prepare(llama, make_records()[1:2], update=update, trajectory_source="online", online_iterations=3)
    assert set(seen) == {0, 1, 2, 3}


def test_the_run_goes_through_the_block_sizes_in_equal_parts(llama):
    options = {"block_size_schedule": [2, 3, 4]}
    sizes = [
        prepare(llama, make_records(), progress=update / 12, **options)[0].blocks.states.shape[-1]
        for update in range(13)
    ]
    assert sizes == [2] * 4 + [3] * 4 + [4] * 5


@pytest.mark.parametrize("setting", ["noisy", "noisy local"])
def test_long_windows_take_no_more_columns_than_the_longest_response(llama, setting):
    prepared, _ = prepare(llama, make_records(), **{**SETTINGS[setting], "noise_window": 64})
    longest = -(-18 // BLOCK_SIZE) * BLOCK_SIZE
    assert prepared.blocks.states.shape[-1] <= longest


def test_progressive_states_do_not_depend_on_the_padding_of_the_last_block(llama):
    records = [[make_record(6, 12, pad=pad), make_record(4, 21, pad=pad)] for pad in (0, 9)]
    chosen = [contributions(prepare(llama, each, **SETTINGS["progressive"])[0]) for each in records]
    assert chosen[0] == chosen[1]


@pytest.mark.parametrize("setting", ["global", "online", "noisy", "ground truth"])
def test_a_response_may_reach_the_last_position_of_the_model(setting):
    """The block at its end goes on after that."""
    records = [make_record(4, 18, num_states=7), make_record(3, 6)]
    model, larger = make_model("gpt2", n_positions=22), make_model("gpt2", n_positions=40)
    weights = larger.state_dict()
    weights["transformer.wpe.weight"][:22] = model.state_dict()["transformer.wpe.weight"]
    weights.update({name: weight for name, weight in model.state_dict().items() if "wpe" not in name})
    larger.load_state_dict(weights)
    sums = []
    for one in (model, larger):
        prepared, objective = prepare(one, records, **SETTINGS[setting])
        sums.append(objective.sum_losses(one, one, prepared))
    assert sums[0][0] > 0
    torch.testing.assert_close(*sums)


@pytest.mark.parametrize("setting", ["global", "online", "ground truth"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_sequences_beyond_the_positions_of_the_config(name, setting):
    """Rotary positions go on after those that the config tells."""
    model = make_model(name, max_position_embeddings=8)
    check_against_plain_forwards(model, make_records(), **SETTINGS[setting])


def test_weights_begin_anew_in_each_block_of_a_noisy_window(llama):
    (flat, _), (falling, _) = (
        prepare(llama, make_records(), **SETTINGS["noisy"], position_decay=decay) for decay in (None, 1.5)
    )
    blocks = [weights.weights.unflatten(-1, (-1, BLOCK_SIZE)) for weights in (flat, falling)]
    for trained, weights in zip(*(each.flatten(0, 2) for each in blocks)):
        expected = position_weights(trained > 0, 1.5)
        assert torch.equal(weights, expected)
    assert (blocks[0][..., 1, :] > 0).any()
