"""The dataset card: its metadata, its words, its code, and what it leaves of an earlier card."""

import copy
import re

import pytest
from collections_on_disk import make_records, write_collection
from conftest import make_word_model
from huggingface_hub import DatasetCard
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from cllm_hf.trajectories.card import BEGIN, END, make_card, merge_card


RECORDS = make_records(20)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    path = tmp_path_factory.mktemp("card")
    return write_collection(path, {"train": [RECORDS[:15], []], "test": [RECORDS[15:]]})


def changed(manifest, **entries):
    """The manifest with other values deep within: `prompts__license="mit"`."""
    manifest = copy.deepcopy(manifest)
    for name, value in entries.items():
        place = manifest
        *outer, last = name.split("__")
        for step in outer:
            place = place[step]
        place[last] = value
    return manifest


def test_metadata(manifest):
    data = DatasetCard(make_card({"default": manifest}, "user/name")).data.to_dict()
    assert data == {
        "license": "mit",
        "source_datasets": ["openai/gsm8k"],
        "size_categories": ["n<1K"],
        "task_categories": ["text-generation"],
        "tags": ["cllm", "consistency-llm", "jacobi-decoding", "trajectories"],
        "configs": [
            {
                "config_name": "default",
                "data_files": [
                    {"split": "train", "path": "data/train-*.parquet"},
                    {"split": "test", "path": "data/test-*.parquet"},
                ],
            }
        ],
    }


@pytest.mark.parametrize(
    ("license", "expected", "name"),
    [
        (None, None, None),
        ("Apache-2.0", "apache-2.0", None),
        ("My Own License (2)", "other", "my-own-license-2"),
    ],
)
def test_licenses_that_the_hub_does_not_know_have_a_name(manifest, license, expected, name):
    text = make_card({"default": changed(manifest, prompts__license=license)}, None)
    data = DatasetCard(text).data.to_dict()
    assert (data.get("license"), data.get("license_name")) == (expected, name)
    assert (f"Their license is `{license}`" if license else "Their license is not recorded") in text


def test_licenses_of_several_configurations(manifest):
    others = {"a": changed(manifest, prompts__license="mit"), "b": changed(manifest, prompts__license="Ours")}
    data = DatasetCard(make_card({"default": manifest, **others}, None)).data.to_dict()
    assert data["license"] == ["mit", "other"] and data["license_name"] == "ours"
    assert data["source_datasets"] == ["openai/gsm8k"]
    assert [config["config_name"] for config in data["configs"]] == ["default", "a", "b"]


@pytest.mark.parametrize("source", [None, "prompts.jsonl", "data/prompts.jsonl", "a/b/c", "my own head", "-/x"])
def test_only_ids_of_the_hub_are_source_datasets(manifest, source):
    text = make_card({"default": changed(manifest, prompts__source=source)}, None)
    assert "source_datasets" not in DatasetCard(text).data.to_dict()
    assert (f"The prompts come from `{source}`." if source else "is not recorded.") in text


def test_splits_without_rows_are_left_out(tmp_path):
    manifest = write_collection(tmp_path, {"train": [RECORDS], "test": [[]]})
    (config,) = DatasetCard(make_card({"default": manifest}, None)).data.configs
    assert [entry["split"] for entry in config["data_files"]] == ["train"]


@pytest.mark.parametrize(("number", "size"), [(999, "n<1K"), (1000, "1K<n<10K"), (10**8, "n>10M")])
def test_size(manifest, number, size):
    name = next(iter(manifest["shards"]))
    others = {name: {"records": 0} for name in manifest["shards"]}
    many = changed(manifest, shards={**others, name: {"records": number}})
    assert DatasetCard(make_card({"default": many}, None)).data.size_categories == [size]


def test_figures(manifest):
    text = make_card({"default": manifest}, "user/name")
    assert "There were 23 prompts. 20 are in the dataset" in text
    assert "| `kept` | 20 | 87.0% | in the dataset |" in text
    assert "| `duplicate` | 2 | 8.7% | the same prompt" in text
    assert "`not_greedy`" not in text, "what never happened is not listed"
    blocks = [block for record in RECORDS[:15] for block in record["states"]]
    mean = sum(len(block) - 1 for block in blocks) / len(blocks)
    assert f"Split `train`: 15 responses, {len(blocks)} blocks. A block takes {mean:.2f} iterations" in text
    assert "`block_size=4`" in text and "`cleaning.max_token_run=10`" in text and "2403.00835" in text
    assert "nan" not in text and "None" not in text.split("Options")[0]


def test_reasons_that_are_not_known_are_listed_too(manifest):
    assert "| `too_green` | 1 | 4.3% |  |" in make_card({"default": changed(manifest, counts__too_green=1)}, None)


def test_the_same_manifests_give_the_same_bytes(manifest):
    manifests = {"default": manifest, "b": manifest, "a": manifest}
    text = make_card(manifests, "user/name")
    assert text == make_card(copy.deepcopy(dict(reversed(manifests.items()))), "user/name")
    assert text.index("made: `default`") < text.index("made: `a`") < text.index("made: `b`")


def test_augmented_states_are_a_column_where_there_are_any(manifest):
    assert "`augmented_states`" not in make_card({"default": manifest}, None)
    assert "`augmented_states`" in make_card({"default": changed(manifest, options__augment=True)}, None)


def test_plots_that_are_not_there_are_not_shown(manifest):
    text = make_card({"default": manifest, "code": manifest}, None, plots=["code"])
    assert "](code/statistics.png)" in text and "](statistics.png)" not in text


def test_no_manifest():
    with pytest.raises(ValueError, match="at least one"):
        make_card({}, None)


@pytest.mark.parametrize("is_adapter", [False, True], ids=["model", "adapter"])
def test_the_code_runs(tmp_path, tokenizer, monkeypatch, is_adapter):
    """A dataset that an adapter has given is trained on by training that adapter further."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    model = make_word_model(tokenizer)
    model.save_pretrained(tmp_path / "model")
    target = tmp_path / "model"
    if is_adapter:
        target = tmp_path / "adapter"
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])).save_pretrained(target)
    tokenizer.save_pretrained(target)
    manifest = write_collection(tmp_path / "made", {"train": [make_records(4, vocabulary=40)]})
    for part in ("model", "tokenizer"):
        manifest[part]["name"] = str(target)
    code = re.findall(r"```python\n(.*?)```", make_card({"default": manifest}, None), flags=re.DOTALL)
    assert len(code) == 2
    options = f'output_dir="{tmp_path / "cllm"}", bf16=False, max_steps=1, report_to=[], use_cpu=True'
    names = {}
    for part in code:
        part = part.replace("path/to/this/folder", str(tmp_path / "made"))
        exec(part.replace('output_dir="cllm"', options), names)
    assert len(names["dataset"]) == 4
    assert (tmp_path / "cllm" / "generation_config.json").is_file()
    assert (tmp_path / "cllm" / "adapter_model.safetensors").is_file() == is_adapter


def test_merging_a_card_with_itself_changes_nothing(manifest):
    card = make_card({"default": manifest, "code": manifest}, "user/name")
    assert merge_card(card, card) == card
    assert merge_card("", card).split() == card.split()


def test_merging_renews_what_is_ours(manifest):
    old = make_card({"default": manifest, "gone": manifest}, "user/name")
    new = make_card({"default": changed(manifest, prompts__license="cc0-1.0")}, "user/name")
    merged = merge_card(old.replace(BEGIN, f"Above.\n\n{BEGIN}").replace(END, f"{END}\n\nBelow."), new)
    text = DatasetCard(merged).text
    assert text.strip().startswith("Above.") and text.strip().endswith("Below.")
    assert text.replace("Above.", "").replace("Below.", "").split() == DatasetCard(new).text.split()
    assert DatasetCard(merged).data.license == "cc0-1.0"


def test_merging_keeps_what_is_of_others(manifest):
    theirs = """---
language:
- en
license: other
license_name: theirs
tags: maths
configs:
- config_name: default
  data_files: old-*.parquet
- config_name: raw
  data_files: raw.jsonl
dataset_info:
- config_name: default
  splits: []
- config_name: raw
  splits: []
---
# Theirs

Words.
"""
    new = make_card({"default": manifest}, "user/name")
    merged = DatasetCard(merge_card(theirs, new))
    assert merged.text.strip().startswith("# Theirs\n\nWords.\n\n<!--")
    data, ours = merged.data.to_dict(), DatasetCard(new).data.to_dict()
    assert data["language"] == ["en"] and data["license"] == "mit" and "license_name" not in data
    assert data["tags"] == ["maths", *ours["tags"]]
    assert data["configs"] == [{"config_name": "raw", "data_files": "raw.jsonl"}, *ours["configs"]]
    assert data["dataset_info"] == {"config_name": "raw", "splits": []}
    assert merge_card(str(merged), new) == str(merged)


@pytest.mark.parametrize("earlier", ["---\na: [\n---\nText", "---\n- a\n- b\n---\nText"])
def test_metadata_that_is_not_valid(manifest, earlier):
    with pytest.raises(ValueError, match="valid YAML"):
        merge_card(earlier, make_card({"default": manifest}, None))


@pytest.mark.parametrize("name", ["/home/me/models/target", "./target", "runs/demo/target"])
def test_folders_of_this_machine_are_not_told_to_others(manifest, name):
    local = changed(manifest, model__name=name, tokenizer__name=name)
    assert f"`{name}`" in make_card({"default": local}, None)
    published = make_card({"default": local}, "user/name")
    assert name not in published and "`path/to/" in published
    on_the_hub = changed(manifest, model__name="user/model")
    assert "`user/model`" in make_card({"default": on_the_hub}, "user/name")
