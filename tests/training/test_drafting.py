"""Training a lossless adapter: its loss against PEFT's own activated LoRA, and what a step may and may not change."""

import shutil

import pytest
import torch
from conftest import make_model
from peft import LoraConfig, PeftModel, get_peft_model
from training_cases import make_config, make_records, slow_divergence
from training_runs import make_dataset, make_tiny_model, make_trainer, weights_of

from cllm_hf import CollapseCallback
from cllm_hf.blocks.drafter import DRAFTER_FILE, Drafter, find_drafter, is_lossless
from cllm_hf.loading import load_cllm
from cllm_hf.training.batch import make_collator
from cllm_hf.training.drafting import DraftingObjective
from cllm_hf.training.inputs import make_lossless_config, prepare_drafter
from cllm_hf.training.monitoring import LOSSLESS_METRICS, METRICS


def make_drafting_model(name="llama", num_masks=4, markov_rank=3, dropout=0.0):
    """A model with an adapter and a drafter of random weights, none of them zero."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=dropout)
    model = get_peft_model(make_model(name), make_lossless_config(config))
    prepare_drafter(model, num_masks, markov_rank)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.requires_grad:
                scale = 0.3 if "lora" in parameter_name or "following" in parameter_name else 1.0
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model.train()


def prepare(records, block_size=5, update=1, **options):
    config = make_config(lossless=True, block_size=block_size, **options)
    batch = make_collator(config, block_size).collate(records)
    objective = DraftingObjective(config, block_size)
    return objective.prepare(None, None, batch, update, 0.0), objective


def sum_losses(model, prepared, objective):
    return objective.sum_losses(model, model.get_base_model(), prepared)


def slow_losses(model, records, prepared, objective, num_masks):
    """One plain forward pass a block, the adapter on its masks by PEFT, and the definitions over Python floats."""
    drafter, total, num_right = find_drafter(model.get_base_model()), 0.0, 0.0
    embed = model.get_input_embeddings()
    for row, record in enumerate(records):
        text = record["prompt_ids"] + record["response_ids"]
        with torch.no_grad():
            clean = model(torch.tensor([text]), alora_offsets=[0]).logits[0]
        for block, offset in enumerate(prepared.offsets[row].tolist()):
            weights = prepared.weights[row, block].tolist()
            if not any(weights):
                continue
            seen = text[: len(record["prompt_ids"]) + offset]
            inputs = torch.cat([embed(torch.tensor([seen])), drafter.masks[None]], dim=1)
            logits = model(inputs_embeds=inputs, alora_offsets=[num_masks]).logits[0, -num_masks:]
            for distance, weight in enumerate(weights):
                place = len(seen) + distance
                if place >= len(text):
                    assert weight == 0
                    continue
                markov = drafter.following.weight @ drafter.previous.weight[text[place]]
                own = (logits[distance] + markov).softmax(-1).tolist()
                target = clean[place].softmax(-1).tolist()
                total += weight * slow_divergence(objective.config.divergence, target, own)
                num_right += weight * (max(own) == own[max(range(len(target)), key=target.__getitem__)])
    return total, num_right


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "mistral"])
def test_losses_are_those_of_plain_forward_passes_with_activated_lora(name):
    model, records = make_drafting_model(name), make_records()
    prepared, objective = prepare(records, position_decay=2.0, drafts_per_response=4)
    losses = sum_losses(model, prepared, objective).tolist()
    assert model.training
    expected = slow_losses(model.eval(), records, prepared, objective, num_masks=4)  # without the model's own dropout
    assert losses == pytest.approx(expected, rel=2e-4)
    assert expected[0] > 1


def test_a_block_ends_where_the_response_does_and_weighs_less_with_distance():
    records = make_records()  # responses of 7, 1 and 13 tokens
    prepared, _ = prepare(records, position_decay=2.0, drafts_per_response=99)
    decay = torch.exp(-torch.arange(4) / 2.0)
    for offsets, weights, length in zip(prepared.offsets, prepared.weights, (7, 1, 13)):
        # After every place, once, that has a token to draft: not after the last two.
        assert offsets[: max(length - 1, 1)].tolist() == list(range(max(length - 1, 1)))
        for offset, weight in zip(range(length - 1), weights):
            count = min(length - 1 - offset, 4)
            torch.testing.assert_close(weight, torch.where(torch.arange(4) < count, decay, 0.0))
        assert not weights[length - 1 :].any()
    assert prepared.counts.tolist() == pytest.approx([prepared.weights.sum().item()] * 2)


def test_places_are_spread_over_a_response_and_new_in_every_step_but_the_same_when_it_is_repeated():
    records = make_records()
    drawn = [prepare(records, update=update, drafts_per_response=3)[0].offsets for update in range(40)]
    assert torch.equal(drawn[3], prepare(records, update=3, drafts_per_response=3)[0].offsets)
    longest = torch.stack([offsets[2] for offsets in drawn])  # 12 places
    for third in range(3):
        assert set(longest[:, third].tolist()) == set(range(4 * third, 4 * third + 4))


def test_places_do_not_depend_on_the_batch():
    records = make_records()
    together, _ = prepare(records, drafts_per_response=3)
    for number, record in enumerate(records):
        alone, _ = prepare([record], drafts_per_response=3)
        count = alone.offsets.shape[1]
        assert torch.equal(together.offsets[number, :count], alone.offsets[0])


def test_a_step_changes_the_adapter_and_its_drafter_and_nothing_else(tmp_path):
    trainer = make_trainer(tmp_path, lossless=True, block_size=4)
    before = weights_of(trainer)
    trainer.train()
    changed = {name for name, weight in weights_of(trainer).items() if not torch.equal(weight, before[name])}
    trained = {name for name in before if "lora_" in name or "cllm_drafter" in name}
    assert changed == trained
    of_the_drafter = find_drafter(trainer.model.get_base_model()).state_dict()
    assert of_the_drafter.keys() == {"masks", "previous.weight", "following.weight"}
    assert sum("cllm_drafter" in name for name in trained) == len(of_the_drafter)


def test_gradient_accumulation_gives_the_step_of_one_large_batch(tmp_path):
    runs = [
        make_trainer(tmp_path / str(size), lossless=True, block_size=4, max_grad_norm=0.0, **options)
        for size, options in ((8, {}), (2, {"gradient_accumulation_steps": 4}))
        for options in ({"per_device_train_batch_size": size, "max_steps": 1, "optim": "sgd", **options},)
    ]
    weights = []
    for trainer in runs:
        torch.manual_seed(0)  # of the adapter's first weights
        trainer.train()
        weights.append(weights_of(trainer))
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-4, atol=1e-6)


def test_a_resumed_run_ends_as_if_it_had_not_stopped(tmp_path):
    options = {"lossless": True, "block_size": 4, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(tmp_path / "whole", **options)
    whole.train()
    resumed = make_trainer(tmp_path / "resumed", **options)
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    resumed.train(resume_from_checkpoint=True)
    for name, weight in weights_of(whole).items():
        assert torch.equal(weight, weights_of(resumed)[name]), name


def test_the_best_model_has_the_drafter_of_its_checkpoint(tmp_path):
    trainer = make_trainer(
        tmp_path,
        eval_dataset=make_dataset(4, seed=1),
        lossless=True,
        block_size=4,
        max_steps=3,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        num_monitored_prompts=0,
        load_best_model_at_end=True,
        metric_for_best_model="draft_accuracy",
        learning_rate=10.0,  # gets worse
    )
    trainer.train()
    best = Drafter.load(trainer.state.best_model_checkpoint).state_dict()
    assert not trainer.state.best_model_checkpoint.endswith("checkpoint-3")
    for name, weight in find_drafter(trainer.model.get_base_model()).state_dict().items():
        assert torch.equal(weight, best[name])


def test_logs_name_what_is_minimised(tmp_path):
    trainer = make_trainer(tmp_path, eval_dataset=make_dataset(4, seed=1), lossless=True, block_size=4)
    trainer.train()
    metrics = trainer.evaluate()
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(log["drafting_loss"], rel=1e-3)
    assert 0 <= log["draft_accuracy"] <= 1
    assert metrics["eval_loss"] == metrics["eval_drafting_loss"]
    assert [name for name in METRICS if f"eval_{name}" in metrics] == list(LOSSLESS_METRICS)
    assert not any("consistency" in name or "ar_loss" in name for name in {**log, **metrics})


def test_a_saved_adapter_is_the_base_model_to_peft_and_drafts_when_it_is_loaded(tmp_path):
    model = make_tiny_model()
    model.save_pretrained(tmp_path / "base")
    trainer = make_trainer(tmp_path / "run", model=str(tmp_path / "base"), lossless=True, block_size=4)
    trainer.train()
    trainer.save_model()
    assert (tmp_path / "run" / DRAFTER_FILE).is_file()
    loaded = load_cllm(tmp_path / "run")
    assert is_lossless(loaded.active_peft_config)
    for name, weight in find_drafter(loaded.get_base_model()).state_dict().items():
        assert torch.equal(weight, find_drafter(trainer.model.get_base_model()).state_dict()[name])
    ids = torch.randint(3, 30, (2, 7))
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    output = loaded.generate(ids, max_new_tokens=9, return_dict_in_generate=True)
    assert torch.equal(output.sequences, model.generate(ids, max_new_tokens=9, decoding="autoregressive"))
    assert output.jacobi_stats.num_forwards <= 9


def test_a_lossless_adapter_is_trained_further(tmp_path):
    make_tiny_model().save_pretrained(tmp_path / "base")
    first = make_trainer(tmp_path / "first", model=str(tmp_path / "base"), lossless=True, block_size=4)
    first.train()
    first.save_model()
    second = make_trainer(tmp_path / "second", model=str(tmp_path / "first"), lossless=True, block_size=4)
    start = weights_of(second)
    for name, weight in weights_of(first).items():
        assert torch.equal(weight, start[name])
    second.train()
    assert any(not torch.equal(weight, start[name]) for name, weight in weights_of(second).items() if "masks" in name)
    with pytest.raises(ValueError, match="lossless=True"):
        make_trainer(tmp_path / "third", model=str(tmp_path / "first"))
    loaded = load_cllm(tmp_path / "first", is_trainable=True)
    third = weights_of(make_trainer(tmp_path / "third", model=loaded, lossless=True, block_size=4))
    assert all(torch.equal(weight, third[name]) for name, weight in weights_of(first).items())
    alone = PeftModel.from_pretrained(make_tiny_model(), tmp_path / "first", is_trainable=True)
    with pytest.raises(ValueError, match="must have its drafter, which PEFT alone does not load.*Pass the folder"):
        make_trainer(tmp_path / "fourth", model=alone, lossless=True, block_size=4)
    other = get_peft_model(make_tiny_model(), LoraConfig(task_type="CAUSAL_LM"))
    with pytest.raises(
        ValueError, match="trains an adapter that drafts.*Pass the model without it, and a `peft_config"
    ):
        make_trainer(tmp_path / "fourth", model=other, lossless=True, block_size=4)
    with pytest.raises(ValueError, match="at most 3 tokens"):
        make_trainer(tmp_path / "third", model=str(tmp_path / "first"), lossless=True, block_size=9)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"ar_loss_weight": 2.0}, "ar_loss_weight"),
        ({"consistency": "local"}, "consistency"),
        ({"block_size": 1}, "at least 2 tokens"),
        ({"markov_rank": -1}, "markov_rank"),
        ({"drafts_per_response": 0}, "drafts_per_response"),
    ],
)
def test_options_that_have_no_place_are_refused(options, named):
    with pytest.raises(ValueError, match=named):
        make_config(lossless=True, **options)


@pytest.mark.parametrize("options", [{"markov_rank": 8}, {"drafts_per_response": 3}])
def test_options_of_a_drafter_have_no_place_elsewhere(options):
    with pytest.raises(ValueError, match="with `lossless=True` alone"):
        make_config(**options)


@pytest.mark.parametrize(
    "options",
    [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"bias": "all"}, {"trainable_token_indices": [3]}],
)
def test_adapters_that_cannot_be_switched_off_by_rows_are_refused(options):
    with pytest.raises(ValueError, match="plain LoRA"):
        make_lossless_config(LoraConfig(r=2, **options))


def test_the_config_that_is_passed_stays_as_it_is():
    given = LoraConfig(r=2, target_modules=["q_proj"])
    config = make_lossless_config(given)
    assert given.alora_invocation_tokens is None and given.task_type is None
    assert config.r == 2 and set(config.target_modules) == {"q_proj"} and is_lossless(config)


def test_loss_falls_on_what_is_trained(tmp_path):
    trainer = make_trainer(tmp_path, make_dataset(4), lossless=True, block_size=4, max_steps=30, learning_rate=3e-3)
    trainer.train()
    logs = [log["drafting_loss"] for log in trainer.state.log_history if "drafting_loss" in log]
    assert logs[-1] < 0.6 * logs[0]


def test_layers_of_experts_are_refused_with_the_way_out(tmp_path):
    with pytest.raises(ValueError, match="layers of the attention"):
        make_trainer(tmp_path, model=make_model("mixtral"), lossless=True, block_size=4)


def test_evaluation_decodes_by_the_adapter_and_looks_for_no_collapse(tmp_path):
    trainer = make_trainer(
        tmp_path, eval_dataset=make_dataset(4, seed=1), lossless=True, block_size=4, on_collapse="stop", max_steps=1
    )
    assert not any(isinstance(callback, CollapseCallback) for callback in trainer.callback_handler.callbacks)
    trainer.train()
    metrics = trainer.evaluate()
    assert 1 <= metrics["eval_tokens_per_forward"] <= 4
    # The responses are the model's own, up to the longest of the dataset.
    longest = max(map(len, trainer.eval_dataset["response_ids"]))
    own = [
        trainer.model.generate(torch.tensor([ids]), max_new_tokens=longest, decoding="autoregressive").shape[1]
        - len(ids)
        for ids in trainer.eval_dataset["prompt_ids"]
    ]
    assert metrics["eval_response_tokens"] == pytest.approx(sum(own) / len(own))
    assert not any("agreement" in name or "repetition" in name for name in metrics)
