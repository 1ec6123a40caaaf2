"""A model and a tokenizer are known again by what they are, not by what they are called."""

import copy

import pytest
import torch
from conftest import make_model, make_word_model
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model

from cllm_hf.trajectories.manifest import (
    describe_model,
    find_commit,
    fingerprint_tokenizer,
    fingerprint_weights,
)


def test_equal_weights_have_equal_fingerprints_and_others_do_not(llama, tmp_path):
    same = fingerprint_weights(llama)
    llama.save_pretrained(tmp_path)
    assert (
        fingerprint_weights(type(llama).from_pretrained(tmp_path)) == same == fingerprint_weights(make_model("llama"))
    )
    assert fingerprint_weights(make_model("llama", seed=1)) != same
    assert fingerprint_weights(copy.deepcopy(llama).bfloat16()) != same
    with torch.no_grad():
        llama.model.norm.weight.add_(1e-3)
    assert fingerprint_weights(llama) != same


def test_an_adapter_counts(tokenizer):
    model = make_word_model(tokenizer)
    alone = fingerprint_weights(model)
    peft_model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM"))
    with_adapter = fingerprint_weights(peft_model.get_base_model())
    with torch.no_grad():
        next(p for name, p in peft_model.named_parameters() if "lora_B" in name).add_(0.1)
    assert len({alone, with_adapter, fingerprint_weights(peft_model.get_base_model())}) == 3


def test_what_acts_counts_too(llama, tokenizer):
    before = fingerprint_weights(llama)
    llama.config.use_cache, llama.config.pad_token_id = False, 3  # decide nothing
    assert fingerprint_weights(llama) == before
    llama.config.rope_parameters = {**llama.config.rope_parameters, "rope_theta": 5e5}
    assert fingerprint_weights(llama) != before
    model = get_peft_model(make_word_model(tokenizer), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    model.add_adapter("other", LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    acting = [fingerprint_weights(model.get_base_model())]
    model.set_adapter("other")
    acting.append(fingerprint_weights(model.get_base_model()))
    with model.disable_adapter():
        acting.append(fingerprint_weights(model.get_base_model()))
    assert len(set(acting)) == 3
    llama.register_buffer("scales", torch.ones(4))
    with_buffer = fingerprint_weights(llama)
    llama.scales.mul_(3)
    assert fingerprint_weights(llama) != with_buffer


def test_a_tokenizer_is_what_it_makes_of_text(tokenizer, byte_tokenizer):
    before = fingerprint_tokenizer(tokenizer)
    tokenizer(["Mia", "Mia has 7"], padding=True)  # the host leaves that in its rules
    assert fingerprint_tokenizer(tokenizer) == before != fingerprint_tokenizer(byte_tokenizer)
    other = copy.deepcopy(tokenizer)
    other.chat_template = "{{ messages }}"
    assert fingerprint_tokenizer(other) != before


def test_the_commit_of_a_model_is_read_in_the_cache_of_the_hub(tmp_path, monkeypatch, llama):
    repository = tmp_path / "models--user--name"
    commits = {"main": "a" * 40, "v2": "b" * 40}
    (repository / "refs").mkdir(parents=True)
    for revision, commit in commits.items():
        (repository / "snapshots" / commit).mkdir(parents=True)
        (repository / "snapshots" / commit / "config.json").write_text("{}")
        (repository / "refs" / revision).write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert find_commit("user/name") == commits["main"]
    assert find_commit("user/name", "v2") == find_commit("user/name", commits["v2"]) == commits["v2"]
    assert find_commit("user/other") is None and find_commit("user/other", "v3") == "v3"
    assert find_commit(str(tmp_path)) is None and find_commit("") is None and find_commit("no id at all") is None
    llama.name_or_path = "user/name"
    assert describe_model(llama)["revision"] == commits["main"]


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_description_is_ready_for_json(name):
    described = describe_model(make_model(name, attention="eager"))
    assert described["attention"] == "eager" and described["dtype"] == "float32" and described["name"] is None
