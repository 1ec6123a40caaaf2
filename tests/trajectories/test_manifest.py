"""
`manifest.json` as anybody may have written it, and as it is published; a model and a tokenizer are known again by what
they are, not by what they are called.
"""

import copy
import json

import pytest
import torch
from collections_on_disk import make_records, write_collection
from conftest import make_model, make_word_model
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model
from test_files import BAD_NAMES

from cllm_hf.trajectories import hub
from cllm_hf.trajectories.manifest import (
    describe_model,
    find_commit,
    find_problem,
    fingerprint_tokenizer,
    fingerprint_weights,
    read_manifest,
    recorded_model,
    without_folders,
)


@pytest.fixture
def folder(tmp_path):
    write_collection(tmp_path / "made", {"train": [make_records(5)], "test": [[]]})
    return tmp_path / "made"


def rewrite(folder, change):
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


NAMES = [
    "README.md",
    "data/x.parquet",
    "data/train-0-of-1.parquet/..",
    "data/tr-ain-0-of-1.parquet",
    "x/train-0-of-1.parquet",
]
NAMES += ["data/train-\uff10-of-1.parquet", "data/train-0-of-1.parquet\n", "data/../train-0-of-1.parquet"]


@pytest.mark.parametrize("name", [*(name for name in BAD_NAMES if isinstance(name, str)), *NAMES])
def test_nothing_but_shards_is_named(folder, name):
    rewrite(folder, lambda manifest: manifest["shards"].update({name: {"records": 0}}))
    with pytest.raises(ValueError, match="got the shard"):
        read_manifest(folder)


def test_names_twice_are_refused(folder):
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"shards": {', '"shards": {"a": 1, "a": 2}, "shards": {'))
    with pytest.raises(ValueError, match="'(a|shards)' twice"):
        read_manifest(folder)
    (folder / "manifest.json").write_text(text)
    rewrite(folder, lambda manifest: manifest["shards"].update({"data/Train-00000-of-00001.parquet": {"records": 0}}))
    with pytest.raises(ValueError, match="differ by case"):
        read_manifest(folder)


@pytest.mark.parametrize("where", ["manifest.json", "data", "data/train-00000-of-00001.parquet"])
def test_links_out_of_the_folder_are_refused(folder, tmp_path, where):
    (folder / where).rename(tmp_path / "moved")
    (folder / where).symlink_to(tmp_path / "moved")
    with pytest.raises(ValueError, match="a link to"):
        read_manifest(folder)


def test_every_entry_has_its_kind(folder):
    """Every part of a manifest in turn, replaced by others, is a problem with its name."""
    manifest = read_manifest(folder)
    assert find_problem(manifest, is_whole=True) is None
    for name in ("complete", "prompts_done", "model", "tokenizer", "prompts", "options", "counts", "statistics"):
        for junk in ([], "x", 1.5, -1):
            assert f"`{name}` " in find_problem({**manifest, name: junk})
        assert find_problem({**manifest, name: None}) is None or name == "model"
        assert find_problem({**manifest, name: None}, is_whole=True) is not None
    for part, name in (
        ("model", "num_parameters"),
        ("options", "block_size"),
        ("prompts", "count"),
        ("counts", "kept"),
    ):
        for junk in (True, "1", -1, [], 0.5):
            changed = copy.deepcopy(manifest)
            changed[part][name] = junk
            assert f"`{part}.{name}`" in find_problem(changed)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("/home/me/models/llama", "path/to/llama"),
        ("~/llama", "path/to/llama"),
        ("C:\\Users\\me\\llama", "path/to/llama"),
        ("\\\\host\\share\\llama", "path/to/llama"),
        ("file:///home/me/llama", "path/to/llama"),
        ("runs/me/llama", "path/to/llama"),
        ("user/llama", "user/llama"),
        ("https://example.com/a/b/prompts", "https://example.com/a/b/prompts"),
    ],
)
def test_a_published_manifest_tells_no_folders(folder, name, shown):
    def change(manifest):
        manifest["model"]["name"] = manifest["tokenizer"]["name"] = manifest["prompts"]["source"] = name
        manifest["model"]["revision"] = "refs/pr/1"
        manifest["options"]["else"] = [name]

    rewrite(folder, change)
    additions = hub._additions(folder, read_manifest(folder), "default")
    published = additions["manifest.json"]
    published = json.loads(published if isinstance(published, bytes) else (folder / "manifest.json").read_bytes())
    assert published == without_folders(read_manifest(folder))
    assert published["model"]["name"] == published["tokenizer"]["name"] == published["prompts"]["source"] == shown
    assert published["model"]["revision"] == "refs/pr/1" and published["shards"] == read_manifest(folder)["shards"]
    if shown == "path/to/llama":
        assert "me" not in json.dumps(published["options"]["else"]) or name == "runs/me/llama"
        with pytest.raises(OSError, match="path/to/llama.*`--model`"):
            recorded_model("user/data", published["model"])


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
