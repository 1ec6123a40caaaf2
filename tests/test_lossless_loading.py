"""A saved lossless adapter drafts wherever it is loaded, and its text is the base model's."""

import copy
import functools
import inspect
import logging
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_model, make_prompts
from lossless_adapters import NUM_MASKS, decode, save_base, save_lossless_adapter
from peft import LoraConfig, PeftModel
from training_runs import make_trainer
from transformers import AutoModelForCausalLM, PreTrainedModel

import cllm_hf
from cllm_hf import load_cllm
from cllm_hf.adapters import add_drafter
from cllm_hf.blocks.drafter import Drafter, find_drafter
from cllm_hf.cli import main
from cllm_hf.demo.problems import make_tokenizer


ROOT = Path(__file__).parent.parent
IDS = make_prompts(1)[0]
STYLE = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, target_modules=["v_proj", "o_proj"])


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    root = tmp_path_factory.mktemp("lossless")
    base = save_base(root / "base", tokenizer, vocab_size=len(tokenizer))
    return {"base": base, "adapter": save_lossless_adapter(root / "adapter", base, tokenizer)}


@pytest.fixture
def base(folders):
    return AutoModelForCausalLM.from_pretrained(folders["base"])


@pytest.fixture(scope="module")
def text(folders):
    return decode(AutoModelForCausalLM.from_pretrained(folders["base"]), IDS)[0]


def assert_drafts(model, text, **options):
    found, stats = decode(model, IDS, **options)
    assert found == text and stats is not None  # how many tokens a forward pass brings is a matter of `"auto"` here
    found, stats = decode(model, IDS, jacobi_block_size=NUM_MASKS + 1, **options)
    assert found == text and stats.tokens_per_forward > 4  # all drafts are right


def assert_decodes_as_its_base(model, text, **options):
    assert decode(model, IDS, **options) == (text, None)


WAYS = {
    "load_cllm": lambda folders: load_cllm(folders["adapter"]),
    "load_cllm with a base model": lambda folders: load_cllm(
        folders["adapter"], base_model=AutoModelForCausalLM.from_pretrained(folders["base"])
    ),
    "load_cllm with the name of a base model": lambda folders: load_cllm(
        folders["adapter"], base_model=folders["base"], dtype="float32"
    ),
    "load_cllm with a revision of the base model": lambda folders: load_cllm(folders["adapter"], revision="main"),
    "AutoModelForCausalLM": lambda folders: AutoModelForCausalLM.from_pretrained(folders["adapter"]),
    "load_adapter": lambda folders: with_adapter(AutoModelForCausalLM.from_pretrained(folders["base"]), folders),
}


def with_adapter(model, folders, *args, **options):
    model.load_adapter(str(folders["adapter"]), *args, **options)
    return model


@pytest.mark.parametrize("way", WAYS)
def test_it_drafts_by_default_however_it_is_loaded(way, folders, text):
    model = WAYS[way](folders)
    assert not model.training and not any(weight.requires_grad for weight in find(model).parameters())
    assert_drafts(model, text)
    assert_decodes_as_its_base(model, text, decoding="autoregressive")


def find(model):
    return find_drafter(model.get_base_model() if isinstance(model, PeftModel) else model)


@pytest.mark.parametrize("way", WAYS)
def test_it_is_saved_with_its_drafter(way, folders, text, tmp_path):
    """By `save_pretrained` of the host whose model it is, also of a copy that the drafter was changed in."""
    model = copy.deepcopy(WAYS[way](folders))
    with torch.no_grad():
        find(model).masks.mul_(1 + 1e-6)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(Drafter.load(str(tmp_path / "saved")).masks, find(model).masks)
    assert_drafts(load_cllm(tmp_path / "saved"), text)
    again = pickle.loads(pickle.dumps(model))
    again.save_pretrained(tmp_path / "again")
    assert {path.name for path in (tmp_path / "again").iterdir()} == {
        path.name for path in (tmp_path / "saved").iterdir()
    }


def test_several_adapters_are_saved_each_with_its_own(folders, tmp_path):
    model = load_cllm(folders["adapter"])
    model.add_adapter("plain", LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "drafter.safetensors").exists() and not (tmp_path / "plain" / "drafter.safetensors").exists()


@pytest.mark.parametrize("way", ["load_cllm", "AutoModelForCausalLM"])
def test_for_inference_all_of_it_has_the_dtype_of_the_base_model(way, folders):
    load = {"load_cllm": load_cllm, "AutoModelForCausalLM": AutoModelForCausalLM.from_pretrained}[way]
    model = load(folders["adapter"], dtype=torch.bfloat16)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert decode(model, IDS, jacobi_block_size=NUM_MASKS + 1)[1].tokens_per_forward > 4


def test_for_training_it_keeps_float32(folders):
    base = AutoModelForCausalLM.from_pretrained(folders["base"], dtype=torch.bfloat16)
    drafter = find_drafter(with_adapter(base, folders, is_trainable=True))
    assert {(weight.dtype, weight.requires_grad) for weight in drafter.parameters()} == {(torch.float32, True)}


def test_the_signature_stays_and_unregister_takes_the_wrapper_back(base, folders, text):
    wrapped = PreTrainedModel.load_adapter
    try:
        cllm_hf.register()
        assert PreTrainedModel.load_adapter is wrapped
        cllm_hf.unregister()
        original = PreTrainedModel.load_adapter
        assert original is wrapped.__wrapped__ and inspect.signature(original) == inspect.signature(wrapped)
        assert find_drafter(with_adapter(base, folders)) is None
        assert base.generate(IDS, do_sample=False, max_new_tokens=24).tolist() == text
    finally:
        cllm_hf.register()


def test_unregister_leaves_the_wrapper_of_another_library(monkeypatch):
    ours = PreTrainedModel.load_adapter
    owner = next(owner for owner in PreTrainedModel.__mro__ if "load_adapter" in vars(owner))

    def theirs(self, *args, **kwargs):
        return ours(self, *args, **kwargs)

    monkeypatch.setattr(owner, "load_adapter", functools.wraps(ours)(theirs))
    with pytest.raises(RuntimeError, match=r"load_adapter` was wrapped again"):
        cllm_hf.unregister()
    assert owner.load_adapter.__wrapped__ is ours


def test_only_an_active_lossless_adapter_drafts(base, folders, text):
    base.load_adapter(str(folders["adapter"]), "draft")
    assert_drafts(base, text)
    base.add_adapter(STYLE, "style")  # is active now
    styled, stats = decode(base, IDS)
    assert styled != text and stats is None
    assert decode(base, IDS, jacobi_block_size=4)[0] == styled  # Jacobi decoding, as for any adapter
    with pytest.raises(ValueError, match=r"has one, 'draft', which is not active.*`model.set_adapter\('draft'\)`"):
        decode(base, IDS, decoding="lossless")
    base.set_adapter(["draft", "style"])
    assert decode(base, IDS) == (styled, None)
    base.set_adapter("draft")
    assert_drafts(base, text)
    base.disable_adapters()
    assert_decodes_as_its_base(base, text)
    base.enable_adapters()
    base.delete_adapter("style")
    assert_drafts(base, text)
    base.delete_adapter("draft")
    assert_decodes_as_its_base(base, text)
    base.add_adapter(STYLE, "draft")  # another adapter of the name of the deleted one
    assert decode(base, IDS)[1] is None and decode(base, IDS)[0] != text
    base.delete_adapter("draft")
    assert_drafts(with_adapter(base, folders, "draft"), text)


def test_two_lossless_adapters_have_a_drafter_each(base, folders, text, tmp_path):
    other = shutil.copytree(folders["adapter"], tmp_path / "other")
    find(load_cllm(other)).__class__(1, base.config.hidden_size, 3).save(other)  # shorter drafts, no Markov head
    base.load_adapter(str(folders["adapter"]), "cllm")
    weights = {name: weight.clone() for name, weight in base.named_parameters()}
    base.load_adapter(str(other), "drafter")  # parts of its name are in those of the weights of the first one
    kept = dict(base.named_parameters())
    assert all(torch.equal(kept[name], weight) for name, weight in weights.items())
    for name, num_masks in (("drafter", 3), ("cllm", NUM_MASKS)):
        base.set_adapter(name)
        assert find_drafter(base).num_masks == num_masks
        assert decode(base, IDS)[0] == text
    assert_drafts(base, text)


def test_hot_swapping_takes_the_drafter_along(base, folders, text, tmp_path):
    other = shutil.copytree(folders["adapter"], tmp_path / "other")
    find(load_cllm(other)).__class__(1, base.config.hidden_size, 3).save(other)
    base.load_adapter(str(other), "default")
    base.load_adapter(str(folders["adapter"]), "default", hotswap=True)
    assert find_drafter(base).num_masks == NUM_MASKS
    assert_drafts(base, text)
    (other / "drafter.safetensors").unlink()
    base.load_adapter(str(other), "default", hotswap=True)
    assert find_drafter(base) is None


def test_the_drafter_is_read_where_the_adapter_was_found(base, folders, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(
        "cllm_hf.adapters.add_drafter",
        lambda model, name, folder, is_trainable, **options: asked.append((name, folder, is_trainable, options)),
    )
    folder = str(folders["adapter"])
    options = {"revision": "v1", "token": "secret", "cache_dir": str(tmp_path)}
    base.load_adapter(folder, "extra", adapter_kwargs=options)
    AutoModelForCausalLM.from_pretrained(folder, adapter_kwargs=options)
    AutoModelForCausalLM.from_pretrained(folder, **options)
    names = ["extra", "default", "default"]
    assert [call[:3] for call in asked] == [(name, folder, False) for name in names]
    for *_, given in asked:
        given.setdefault("token", "secret")  # transformers drops that of the second call, for the adapter itself too
        assert given.items() >= options.items()


def test_options_of_the_hub_go_for_an_adapter_s_files_too(folders, monkeypatch, tmp_path):
    asked = []

    def note(model, name, folder, is_trainable, **options):
        asked.append(options)
        add_drafter(model, name, folder, is_trainable, **options)

    monkeypatch.setattr("cllm_hf.loading.add_drafter", note)
    options = {"cache_dir": str(tmp_path), "local_files_only": True}
    load_cllm(folders["adapter"], **options)
    load_cllm(folders["adapter"], base_model=AutoModelForCausalLM.from_pretrained(folders["base"]), **options)
    assert asked == [options, options]


def test_a_missing_drafter_is_named(base, folders, text, tmp_path, monkeypatch):
    folder = shutil.copytree(folders["adapter"], tmp_path / "adapter")
    (folder / "drafter.safetensors").unlink()
    message = "must have its drafter beside it, got .* without drafter.safetensors .*Save the adapter by"
    with pytest.raises(OSError, match=message):
        load_cllm(folder)
    warned = []
    monkeypatch.setattr("cllm_hf.adapters.logger.warning", lambda message, error: warned.append(message % error))
    base.load_adapter(str(folder))
    assert len(warned) == 1 and re.search(f"{message}.*decodes as its base model does", warned[0])
    assert_decodes_as_its_base(base, text)


def test_peft_alone_gives_the_base_model(base, folders, text, monkeypatch):
    warned = []
    monkeypatch.setattr(logging.getLogger("cllm_hf.decoding.lossless").__class__, "warning_once", record(warned))
    model = PeftModel.from_pretrained(base, folders["adapter"])
    assert_decodes_as_its_base(model, text)
    assert len(warned) == 1 and "lossless adapter, but not its drafter" in warned[0]
    assert decode(model, IDS, decoding="jacobi")[0] == text
    with pytest.raises(ValueError, match=r"has one without its drafter.*`cllm_hf.load_cllm\(folder\)`"):
        decode(model, IDS, decoding="lossless")
    with pytest.raises(ValueError, match=r"that has none. Train one with `CLLMConfig\(lossless=True\)`"):
        decode(model.unload(), IDS, decoding="lossless")


def record(messages):
    return lambda self, message, *args: messages.append(message)


def test_defaults_but_those_of_the_decoding_stay_the_base_model_s(base, folders):
    """Stop tokens are a part of its text."""
    base.generation_config.update(eos_token_id=decode(base, IDS)[0][0][IDS.shape[1] + 5], repetition_penalty=1.2)
    expected, options = decode(base, IDS)[0], base.generation_config.to_dict()
    other = copy.deepcopy(base)
    with_adapter(other, folders)
    for loaded in (load_cllm(folders["adapter"], base_model=copy.deepcopy(base)), other):
        assert decode(loaded, IDS)[0] == expected
        assert loaded.generation_config.eos_token_id == base.generation_config.eos_token_id
    assert base.generation_config.to_dict() == options


def test_what_is_not_there_is_named(folders, tmp_path):
    with pytest.raises(FileNotFoundError, match="`path` must be a folder.*nothing', which is not there"):
        load_cllm(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="`base_model` must be a folder.*nothing', which is not there"):
        load_cllm(folders["adapter"], base_model=str(tmp_path / "nothing"))
    folder = shutil.copytree(folders["adapter"], tmp_path / "adapter")
    config = (folder / "adapter_config.json").read_text()
    (folder / "adapter_config.json").write_text(config.replace(str(folders["base"]), str(tmp_path / "gone")))
    with pytest.raises(OSError, match="adapter at .* was trained on .*gone.*which is not there.* as `base_model`"):
        load_cllm(folder)
    assert decode(load_cllm(folder, base_model=folders["base"]), IDS)[1] is not None
    (folder / "adapter_config.json").write_text(config[:20])
    with pytest.raises(ValueError, match="`adapter_config.json` of .* must be an object of JSON"):
        load_cllm(folder, base_model=folders["base"])


def test_an_adapter_for_another_model_is_refused(folders):
    with pytest.raises(ValueError, match="does not fit the base model"):
        load_cllm(folders["adapter"], base_model=make_model("llama", hidden_size=64, vocab_size=60))


def test_a_trained_one_is_exported_with_it(tmp_path):
    save_base(tmp_path / "base", vocab_size=len(make_tokenizer()))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    options = {"lossless": True, "max_steps": 1, "export_custom_generate": True, "block_size": 4}
    trainer = make_trainer(tmp_path / "adapter", model=model, lora=LoraConfig(r=2), **options)
    trainer.train()
    trainer.save_model()
    source = (tmp_path / "adapter" / "custom_generate" / "generate.py").read_text()
    assert "EXPORTED_DECODING = 'lossless'" in source
    text = model.generate(IDS, do_sample=False, max_new_tokens=24, decoding="autoregressive").tolist()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    found, stats = decode(loaded, IDS)
    assert found == text and stats is not None


_WITHOUT_TRAINING = """
import sys
for name in ("trl", "datasets", "evaluate"):
    sys.modules[name] = None
import torch, cllm_hf
from transformers import AutoModelForCausalLM
from cllm_hf.blocks.drafter import Drafter, find_drafter
for model in (cllm_hf.load_cllm(sys.argv[1]), AutoModelForCausalLM.from_pretrained(sys.argv[1])):
    output = model.generate(input_ids=torch.tensor([[5, 6, 7]]), max_new_tokens=24, do_sample=False,
                            jacobi_block_size=7, return_dict_in_generate=True)
    print(output.sequences.tolist(), output.jacobi_stats.tokens_per_forward > 4)
"""


@pytest.mark.slow
def test_it_needs_no_package_of_training(folders, base):
    command = [sys.executable, "-c", _WITHOUT_TRAINING, str(folders["adapter"])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = base.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=24, do_sample=False).tolist()
    assert done.stdout.splitlines() == [f"{text} True"] * 2


def test_show_says_what_it_consists_of(folders, capsys):
    prompt = "Mia has 7 apples . Mia buys 5 more . How many apples does Mia have now ?"
    assert main(["show", "--model", str(folders["adapter"]), "--prompt", prompt, "--no-color"]) == 0
    out = capsys.readouterr().out
    model = load_cllm(folders["adapter"])
    num_weights = sum(w.numel() for name, w in model.named_parameters() if "lora" in name or "drafter" in name)
    assert out.startswith("adapter is a lossless adapter: it drafts, and its base model verifies")
    for line in (
        f"Base model: {folders['base']}",
        "LoRA: rank 64, alpha 128, on 21 layers (down_proj, gate_proj, ",
        f"Drafter: 6 masks, for a block size of at most 7; Markov head of rank {model.config.vocab_size}",
        f"Weights: {num_weights:,}, ",
    ):
        assert line in out
    assert "\nBase model: base\n" in out and "Target model" not in out
