"""Training of adapters and in low precision: what moves, what does not, and what cannot be trained."""

import pytest
import torch
from conftest import make_model, make_word_model
from peft import (
    AdaLoraConfig,
    AutoPeftModelForCausalLM,
    CPTConfig,
    LilyConfig,
    LoraConfig,
    MultitaskPromptTuningConfig,
    OSFConfig,
    PeftModel,
    PolyConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from test_packing import make_batch, unpacked_logits
from training_runs import BLOCK_SIZE, logs_of, make_dataset, make_tiny_model, make_trainer, train, weights_of
from transformers import AutoModelForCausalLM

import cllm_hf
from cllm_hf import load_cllm
from cllm_hf.blocks.forward import packed_forward
from cllm_hf.blocks.layout import Drafts, pack
from cllm_hf.demo.problems import make_tokenizer


LORA = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": "all-linear"}
GREEDY = {"do_sample": False, "max_new_tokens": 18}


@pytest.mark.parametrize(
    "options", [{}, {"gradient_checkpointing": True}, {"bf16": True, "trajectory_source": "online"}], ids=str
)
def test_the_adapter_moves_and_the_base_stays(tmp_path, options):
    base = {name: weight.clone() for name, weight in make_tiny_model().state_dict().items()}
    trainer = make_trainer(tmp_path, lora=True, **options)
    before = weights_of(trainer)
    trainer.train()
    after = weights_of(trainer)
    adapter = {name for name in after if "lora_" in name}
    assert adapter == {name for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    assert all(not torch.equal(after[name], before[name]) for name in adapter)
    kept = {name: weight for name, weight in after.items() if name not in adapter}
    assert len(kept) == len(base)
    for name, weight in kept.items():
        plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        assert torch.equal(weight, base[plain]), name


def test_an_adapter_is_saved_with_its_defaults_and_merges(tmp_path):
    base_dir, adapter_dir = tmp_path / "base", tmp_path / "adapter"
    make_tiny_model().save_pretrained(base_dir)
    model = AutoModelForCausalLM.from_pretrained(base_dir)
    trainer = make_trainer(adapter_dir, model=model, lora=True, max_steps=6)
    trainer.train()
    trainer.save_model()
    ids = torch.tensor([make_dataset()[0]["prompt_ids"]])
    untrained = make_tiny_model().generate(ids, decoding="autoregressive", **GREEDY)
    expected = trainer.model.eval().generate(input_ids=ids, decoding="autoregressive", **GREEDY)
    assert expected.tolist() != untrained.tolist()
    loaded = load_cllm(adapter_dir)
    output = loaded.generate(input_ids=ids, return_dict_in_generate=True, **GREEDY)
    assert isinstance(output, cllm_hf.JacobiOutput)
    assert max(map(max, output.jacobi_stats.num_committed)) <= BLOCK_SIZE
    assert output.sequences.tolist() == expected.tolist()
    loaded.save_pretrained(tmp_path / "moved")
    defaults = load_cllm(tmp_path / "moved").generation_config
    assert (defaults.decoding, defaults.jacobi_block_size) == ("jacobi", BLOCK_SIZE)
    assert loaded.merge_and_unload().generate(ids, **GREEDY).tolist() == expected.tolist()
    # The host's own loader works too, with the option passed.
    plain = AutoPeftModelForCausalLM.from_pretrained(adapter_dir)
    assert plain.generate(input_ids=ids, decoding="jacobi", **GREEDY).tolist() == expected.tolist()


def test_a_peft_model_trains_like_its_config(tmp_path):
    ours = make_trainer(tmp_path, lora=LoraConfig(**LORA))
    given = make_trainer(tmp_path, model=get_peft_model(make_tiny_model(), LoraConfig(**LORA)))
    given.model.load_state_dict(ours.model.state_dict())
    for trainer in (ours, given):
        trainer.train()
    assert logs_of(ours) == logs_of(given) and len(logs_of(ours)) == 2
    theirs = weights_of(given)
    assert all(torch.equal(weight, theirs[name]) for name, weight in weights_of(ours).items())


def test_training_of_an_adapter_goes_on_where_it_was_saved(tmp_path):
    trainer = make_trainer(tmp_path, lora=True)
    trainer.train()
    trainer.save_model()
    with pytest.raises(ValueError, match="got none in PeftModelForCausalLM. Pass the folder of the adapter"):
        make_trainer(tmp_path / "more", model=PeftModel.from_pretrained(make_tiny_model(), tmp_path))
    loaded = load_cllm(tmp_path, base_model=make_tiny_model(), is_trainable=True)
    more = make_trainer(tmp_path / "more", model=loaded)
    weights = weights_of(trainer)
    assert all(torch.equal(weight, weights[name]) for name, weight in weights_of(more).items())
    more.train()
    assert any(not torch.equal(weight, weights[name]) for name, weight in weights_of(more).items())


def test_a_model_without_anything_to_train_is_refused(tmp_path):
    model = make_tiny_model().requires_grad_(False)
    with pytest.raises(ValueError, match=r"got none in LlamaForCausalLM. Call `model.requires_grad_\(True\)`"):
        make_trainer(tmp_path, model=model)


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_whole_modules_beside_the_adapter_are_trained_saved_and_loaded(tmp_path, module):
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], modules_to_save=[module])
    trainer = make_trainer(tmp_path, lora=config, gradient_checkpointing=module == "embed_tokens")
    before = weights_of(trainer)
    trainer.train()
    trainer.save_model()
    moved = {name for name, weight in weights_of(trainer).items() if not torch.equal(weight, before[name])}
    assert any(f"{module}.modules_to_save" in name for name in moved)
    assert all("lora_" in name or f"{module}.modules_to_save" in name for name in moved)
    loaded, weights = load_cllm(tmp_path, base_model=make_tiny_model()), weights_of(trainer)
    assert all(torch.equal(weight, weights[name]) for name, weight in loaded.state_dict().items())


@pytest.mark.parametrize("lora", [False, True, "lm_head"])
def test_logits_are_computed_where_a_loss_is_only_and_are_the_same(tmp_path, monkeypatch, lora):
    """Also through PEFT's wrapper of the output embeddings."""
    if lora == "lm_head":
        lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    trainer = make_trainer(tmp_path, lora=lora)
    model, base_model = trainer.model.eval(), trainer.model.get_base_model() if lora else trainer.model
    prepared = trainer._prepare_batch(model, trainer.data_collator(list(make_dataset())), "eval")
    sizes = []
    base_model.get_output_embeddings().register_forward_hook(
        lambda module, inputs, logits: sizes.append(logits[..., 0].numel())
    )
    cut = trainer._objective.sum_losses(model, base_model, prepared)

    def all_logits(model, packed, base_model, places):
        return packed_forward(model, packed, base_model).flatten(0, 1)[places]

    monkeypatch.setattr("cllm_hf.training.objective.packed_forward", all_logits)
    whole = trainer._objective.sum_losses(model, base_model, prepared)
    torch.testing.assert_close(cut, whole)
    assert sizes[0] < sizes[1]


def test_low_precision_gives_nearly_the_same_losses(tmp_path):
    exact = train(tmp_path, learning_rate=1e-3)["logs"]
    for name, options in {
        "autocast": {"bf16": True},
        "weights": {"model": make_tiny_model().to(torch.bfloat16)},
    }.items():
        logs = train(tmp_path, learning_rate=1e-3, **options)["logs"]
        assert len(logs) == len(exact) == 2
        for log, other in zip(logs, exact):
            assert log["loss"] == pytest.approx(other["loss"], rel=0.03), name
            assert log["consistency_tokens"] == other["consistency_tokens"]


@pytest.mark.slow
def test_a_compiled_model_trains_the_same(tmp_path):
    compiled = train(tmp_path, torch_compile=True, torch_compile_backend="eager")
    for log, other in zip(compiled["logs"], train(tmp_path)["logs"]):
        assert log == pytest.approx(other, rel=1e-4)


def test_adapter_for_another_model_is_refused(tmp_path):
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    tokenizer, model = make_tokenizer(), make_tiny_model()
    model.name_or_path = "the-right-model"
    make_trainer(tmp_path, model=model, lora=config).save_model()
    wider = make_model("llama", vocab_size=len(tokenizer), hidden_size=64)
    deeper = make_model("llama", vocab_size=len(tokenizer), num_hidden_layers=4)
    other = make_model("gpt2")
    for base_model in (wider, deeper, other):
        weights = {name: tensor.clone() for name, tensor in base_model.state_dict().items()}
        with pytest.raises(ValueError, match="does not fit the base model.*trained on the-right-model: pass that"):
            load_cllm(tmp_path, base_model=base_model)
        left = base_model.state_dict()
        assert left.keys() == weights.keys() and all(torch.equal(left[name], weights[name]) for name in weights)
    with pytest.raises(ValueError, match="loaded already, got dtype"):
        load_cllm(tmp_path, base_model=make_word_model(tokenizer), dtype=torch.float32)


def test_adapter_on_a_model_of_another_name_warns(tmp_path, caplog):
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    model = make_tiny_model()
    model.name_or_path = "the-right-model"
    make_trainer(tmp_path, model=model, lora=config).save_model()
    other = make_tiny_model()
    other.name_or_path = "another-model"
    load_cllm(tmp_path, base_model=other)
    assert "trained on the-right-model and is put on another-model" in caplog.text


def save_adapter(folder, config, seed=0):
    """An adapter that differs from what it begins as, and its logits."""
    torch.manual_seed(seed)
    make_tiny_model().save_pretrained(folder / "base")
    trained = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base"), config).eval()
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
        logits = trained(IDS).logits
    trained.save_pretrained(folder / "adapter")
    return logits


IDS = torch.arange(3, 30)[None]
# Some kinds take their part out of the base weights when they are put on.
KINDS = {
    **{
        str(kind): LoraConfig(init_lora_weights=kind, **LORA)
        for kind in (True, False, "gaussian", "pissa", "olora", "orthogonal", "eva", "lora_ga")
    },
    "dora": LoraConfig(use_dora=True, **LORA),
    "embeddings": LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["embed_tokens", "q_proj"]),
    "tokens": LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], trainable_token_indices=[3, 5]),
    "head": LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "osf": OSFConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]),
    "vera": VeraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]),
    "adalora": AdaLoraConfig(task_type="CAUSAL_LM", total_step=9, target_modules=["q_proj"]),
}


QUICK = ("pissa", "olora", "tokens", "vera")


def slow_but(kinds, quick=QUICK):
    return [kind if kind in quick else pytest.param(kind, marks=pytest.mark.slow) for kind in kinds]


@pytest.mark.parametrize("kind", slow_but(KINDS))
def test_every_kind_of_adapter_loads_as_peft_loads_it(tmp_path, kind):
    logits = save_adapter(tmp_path, KINDS[kind])
    adapter, base_dir = str(tmp_path / "adapter"), tmp_path / "base"
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_dir), adapter).eval()
    state = torch.random.get_rng_state()
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_dir), adapter)
    expected_state = torch.random.get_rng_state()
    torch.random.set_rng_state(state)
    loaded = load_cllm(adapter, base_model=AutoModelForCausalLM.from_pretrained(base_dir))
    assert torch.equal(torch.random.get_rng_state(), expected_state)
    trainer = make_trainer(tmp_path / "more", model=adapter)
    expected = stock.state_dict()
    for model in (loaded, trainer.model.eval()):
        found = model.state_dict()
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
        with torch.no_grad():
            torch.testing.assert_close(model(IDS).logits, logits, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(
    "kind", slow_but(["True", "pissa", "olora", "head", "osf", "vera"], ("True", "pissa", "vera"))
)
def test_an_adapter_that_does_not_fit_leaves_nothing_on_the_base(tmp_path, kind):
    save_adapter(tmp_path, KINDS[kind])
    base_model = make_model("llama", vocab_size=len(make_tokenizer()), hidden_size=64)
    base_model.model.layers[0].requires_grad_(False)
    weights = {name: tensor.clone() for name, tensor in base_model.state_dict().items()}
    needed = {name: parameter.requires_grad for name, parameter in base_model.named_parameters()}
    own, config = set(vars(base_model)), base_model.config.to_dict()
    with pytest.raises(ValueError, match="has shape .* instead of|find no place"):
        load_cllm(tmp_path / "adapter", base_model=base_model)
    left = base_model.state_dict()
    assert left.keys() == weights.keys() and all(torch.equal(left[name], weights[name]) for name in weights)
    assert needed == {name: parameter.requires_grad for name, parameter in base_model.named_parameters()}
    assert set(vars(base_model)) == own and base_model.config.to_dict() == config
    assert not any(module._forward_hooks for module in base_model.modules())


VIRTUAL = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
UNTRAINABLE = [
    PromptTuningConfig(**VIRTUAL),
    PrefixTuningConfig(**VIRTUAL),
    PromptEncoderConfig(**VIRTUAL),
    MultitaskPromptTuningConfig(num_tasks=2, **VIRTUAL),
    CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[3, 4], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 1]),
    LilyConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]),
    PolyConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]),
    LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[5]),
]


@pytest.mark.parametrize("config", UNTRAINABLE, ids=lambda config: config.peft_type.value)
def test_adapters_that_cannot_be_packed_are_refused_by_name(tmp_path, config):
    message = f"do not support adapters of the kind {config.peft_type.value}: .*Use an adapter in the layers"
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, lora=config)
    model = get_peft_model(make_tiny_model(), config)
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, model=model)
    with pytest.raises(ValueError, match=message):
        cllm_hf.TrajectoryBuilder(model, make_tokenizer())


def test_a_saved_adapter_that_cannot_be_packed_is_refused_by_name(tmp_path):
    save_adapter(tmp_path, UNTRAINABLE[0])
    with pytest.raises(ValueError, match="of the kind PROMPT_TUNING"):
        make_trainer(tmp_path / "more", model=str(tmp_path / "adapter"))


@pytest.mark.parametrize("kind", slow_but(["embeddings", "tokens", "osf", "vera", "adalora"], ("tokens", "vera")))
def test_other_adapters_run_packed(tmp_path, kind):
    trainer = make_trainer(tmp_path, lora=KINDS[kind])
    before = weights_of(trainer)
    trainer.train()
    batch = make_batch()
    packed = pack(*batch[:2], Drafts(*batch[2:]))
    with torch.no_grad():
        model = trainer.model.eval()
        logits = packed_forward(model, packed, model.get_base_model())
        clean, blocks = unpacked_logits(model, *batch)
    assert len(blocks) == 5 and all(
        torch.allclose(logits[row, : len(expected)], expected, atol=1e-3) for row, expected in enumerate(clean)
    )
    columns = logits[:, packed.columns()]
    assert all(torch.allclose(columns[place], expected, atol=1e-3) for place, expected in blocks.items())
    assert any(not torch.equal(weight, before[name]) for name, weight in weights_of(trainer).items())


# What the trainer refuses of what a user passes, as a user would pass it.
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"packing": True}, "`packing=True` has no place in consistency training"),
        ({"completion_only_loss": True}, "`completion_only_loss=True` has no place"),
        ({"train_sampling_strategy": "batch_rebalance"}, "`train_sampling_strategy='batch_rebalance'` has no place"),
        ({"activation_checkpointing_kwargs": {"use_reentrant": True}}, "Re-entrant gradient checkpointing"),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, "Re-entrant gradient checkpointing"),
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **options)


def test_attention_that_takes_no_mask_is_refused(tmp_path):
    model = make_tiny_model()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"got `attn_implementation=.flash_attention_2.`. Call `model.set_attn_impl"):
        make_trainer(tmp_path, model=model)
