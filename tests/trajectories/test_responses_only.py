"""Collections of responses alone: the same responses without states, and what can and cannot be done with them."""

import os
import re
import tracemalloc

import pytest
import torch
from collections_on_disk import make_records, write_collection
from conftest import make_word_model
from datasets import Dataset
from huggingface_hub import DatasetCard

from cllm_hf import (
    CleaningRules,
    CLLMConfig,
    CLLMTrainer,
    TrajectoryBuilder,
    load_trajectories,
    measure_trajectories,
)
from cllm_hf.cli import main
from cllm_hf.demo.problems import make_problems
from cllm_hf.trajectories import builder as builder_module
from cllm_hf.trajectories import shard
from cllm_hf.trajectories.card import make_card
from cllm_hf.trajectories.manifest import read_manifest
from cllm_hf.trajectories.options import CollectionOptions
from cllm_hf.trajectories.prompts import read_rows


COLUMNS = ["data_id", "prompt", "response", "prompt_ids", "response_ids"]
OPTIONS = {"max_new_tokens": 17, "max_tokens_per_batch": 200, "prompts_per_shard": 8, "show_progress": False}
PROMPTS = [problem.prompt for problem in make_problems(28, seed=3)]


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / ".cache")


@pytest.fixture
def target(tokenizer, tmp_path):
    """A saved target model with its tokenizer."""
    folder = tmp_path / "target"
    make_word_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_builder(tokenizer, **options):
    return TrajectoryBuilder(make_word_model(tokenizer), tokenizer, **{**OPTIONS, "responses_only": True, **options})


def files_of(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def test_the_responses_are_those_of_a_collection_with_states(tokenizer, monkeypatch):
    full = make_builder(tokenizer, responses_only=False)
    expected = full.build([*PROMPTS, PROMPTS[0]])
    assert set(full.counts) > {"kept", "duplicate"}, "the cleaning rules must have something to drop"
    monkeypatch.setattr(shard, "collect_trajectories", lambda *_: pytest.fail("no states are wanted"))
    builder = make_builder(tokenizer)
    dataset = builder.build([*PROMPTS, PROMPTS[0]])
    assert dataset.column_names == COLUMNS
    assert dataset[:] == expected.select_columns(COLUMNS)[:]
    assert builder.counts == {name: n for name, n in full.counts.items() if "near_ties" not in name}


def test_the_folder_goes_on_after_any_write_and_ends_with_the_same_bytes(tokenizer, tmp_path, monkeypatch):
    builder = make_builder(tokenizer, test_fraction=0.3)
    splits = builder.build(PROMPTS, output_dir=tmp_path / "whole")
    assert {split: one.column_names for split, one in splits.items()} == {"train": COLUMNS, "test": COLUMNS}
    finished = files_of(tmp_path / "whole")
    assert "statistics.png" not in finished and sum("parquet" in name for name in finished) == 8
    replace, calls = os.replace, []

    def stop(source, target):
        replace(source, target)
        calls.append(target)
        if len(calls) % 5 == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stop)
    for _ in range(99):
        try:
            make_builder(tokenizer, test_fraction=0.3).build(PROMPTS, output_dir=tmp_path / "stopped")
            break
        except KeyboardInterrupt:
            continue
    assert len(calls) > 20 and files_of(tmp_path / "stopped") == finished
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "whole").rglob("*")}
    assert make_builder(tokenizer, test_fraction=0.3).collect(PROMPTS, tmp_path / "whole")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "whole").rglob("*")} == before


@pytest.mark.slow
def test_several_processes_write_the_same_bytes(tokenizer, tmp_path, monkeypatch):
    make_builder(tokenizer).collect(PROMPTS, tmp_path / "alone")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, is_complete in (("1", False), ("0", True)):
        monkeypatch.setenv("RANK", rank)
        assert make_builder(tokenizer).collect(PROMPTS, tmp_path / "shared", wait=False) == is_complete
    assert files_of(tmp_path / "shared") == files_of(tmp_path / "alone")


def test_manifest_and_card_say_what_it_holds(tokenizer, tmp_path):
    make_builder(tokenizer).collect(PROMPTS, tmp_path / "made")
    manifest = read_manifest(tmp_path / "made")
    assert manifest["options"]["responses_only"] is True and manifest["statistics"] == {}
    assert not {"block_size", "seed", "augment", "not_greedy"} & set(manifest["options"])
    card = (tmp_path / "made" / "README.md").read_text()
    assert "# Responses" in card and "without Jacobi trajectories" in card and "`responses_only=True`" in card
    assert "lossless training" in card and 'trajectory_source="online"' in card
    assert "converge" not in card and "`states`" not in card
    assert "trajectories" not in DatasetCard(card).data.tags and not card.count("\n\n\n")


def test_a_folder_with_states_is_another_collection(tokenizer, tmp_path):
    assert "responses_only" not in CollectionOptions().to_dict(), "earlier collections go on"
    make_builder(tokenizer).collect(PROMPTS[:8], tmp_path / "made")
    with pytest.raises(ValueError, match="another collection: .*`responses_only` is True there and None here"):
        make_builder(tokenizer, responses_only=False).collect(PROMPTS[:8], tmp_path / "made")


def test_the_card_of_both_kinds(tmp_path):
    with_states = write_collection(tmp_path / "a", {"train": [make_records(5)]})
    options = {"max_new_tokens": 64, "responses_only": True}
    alone = write_collection(tmp_path / "b", {"train": [make_records(5)]}, options=options, statistics={})
    text = make_card({"default": with_states, "alone": alone}, "user/name")
    assert "Configurations of responses alone have no `states`" in text and "`states[b][j]`" in text
    assert "converge: `default`" in text and "converge: `alone`" not in text and "alone/statistics.png" not in text
    assert 'output_dir="cllm"' in text and "trajectories" in DatasetCard(text).data.tags
    assert "lossless=True" in make_card({"alone": alone}, None)


@pytest.mark.parametrize("option", [{"block_size": 8}, {"seed": 1}, {"augment": True}, {"not_greedy": "keep"}])
def test_options_of_states_are_refused(option):
    ((name, value),) = option.items()
    with pytest.raises(ValueError, match=f"`{name}={value!r}` is about states.*`responses_only=True`"):
        CollectionOptions(responses_only=True, **option)
    with pytest.raises(ValueError, match="`responses_only` must be `True` or `False`, got 1"):
        CollectionOptions(responses_only=1)


def test_given_responses_are_refused(tokenizer, tmp_path, capsys):
    with pytest.raises(ValueError, match="`responses_only=True` must get prompts alone.*cllm train --lossless"):
        make_builder(tokenizer).build(Dataset.from_dict({"prompt": PROMPTS[:2], "response": PROMPTS[:2]}))
    (tmp_path / "given.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    arguments = ["--prompts", str(tmp_path / "given.jsonl"), "--output-dir", str(tmp_path / "out")]
    assert main(["collect", "--responses-only", "--model", str(tmp_path / "none"), *arguments]) == 1
    (tmp_path / "none").mkdir()  # a model that cannot be loaded: it is refused before
    assert main(["collect", "--responses-only", "--model", str(tmp_path / "none"), *arguments]) == 1
    assert "`responses_only=True` must get prompts alone" in capsys.readouterr().err


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("change", [{"prompt_ids": []}, {"response_ids": None}, {"response_ids": [3, None]}])
def test_rows_without_tokens_are_found(tmp_path, streaming, change):
    rows = [{name: record[name] for name in COLUMNS} for record in make_records(6)]
    Dataset.from_list(rows).save_to_disk(str(tmp_path / "good"))
    loaded = load_trajectories(tmp_path / "good", streaming=streaming)
    assert [dict(row) for row in loaded] == rows
    Dataset.from_list([*rows, {**rows[0], "data_id": "bad", **change}]).save_to_disk(str(tmp_path / "bad"))
    with pytest.raises(ValueError, match="ecord bad"):
        list(load_trajectories(tmp_path / "bad", streaming=streaming))


def test_what_takes_states_says_that_there_are_none(target, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    folder = str(tmp_path / "out")
    arguments = ["--model", str(target), "--prompts", str(tmp_path / "prompts.txt"), "--max-new-tokens", "17"]
    assert main(["collect", "--responses-only", *arguments, "--output-dir", folder, "--test-fraction", "0.3"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("Kept ") and f"cllm train --lossless --trajectories {folder}" in text
    assert "verify" not in text and "iterations" not in text
    assert main(["inspect", folder, "--record", "1"]) == 0
    shown, record = capsys.readouterr().out, load_trajectories(folder)[1]
    assert "no states" in shown and record["response"] in shown.replace("\n    ", "\n")
    for name in ("prompt_ids", "response_ids"):
        assert re.findall(r"(\d+):\S", shown.split(f"`{name}`:")[1].split("\n\n")[0]) == list(map(str, record[name]))
    for refused in (
        ["inspect", folder, "--statistics"],
        ["inspect", folder, "--block", "0"],
        ["inspect", folder, "--picture", str(tmp_path / "picture.png")],
        ["verify", folder],
        ["train", "--trajectories", folder, "--output-dir", str(tmp_path / "cllm")],
    ):
        assert main(refused) == 1, refused
        assert "States are needed here" in capsys.readouterr().err
    with pytest.raises(ValueError, match="States are needed here.*`--trajectory-source online` or `--lossless`"):
        measure_trajectories(load_trajectories(folder))


@pytest.mark.parametrize(
    "options",
    [{"trajectory_source": "online", "block_size": 5}, pytest.param({"lossless": True}, marks=pytest.mark.slow)],
)
def test_it_is_trained_on(target, tokenizer, tmp_path, options):
    dataset = make_builder(tokenizer).build(PROMPTS, output_dir=tmp_path / "made")
    config = CLLMConfig(
        str(tmp_path / "new"), max_steps=2, report_to=[], use_cpu=True, eval_strategy="steps", **options
    )
    trainer = CLLMTrainer(str(target), config, dataset, dataset.select(range(2)), tokenizer)
    trainer.train()
    assert torch.isfinite(torch.tensor([log["loss"] for log in trainer.state.log_history if "loss" in log])).all()
    assert trainer.state.log_history[-2]["eval_tokens_per_forward"] >= 1


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_prompts(tokenizer, tmp_path, monkeypatch):
    """Beside the tokens of the prompts, what is held is that of a shard."""
    texts, peaks = [problem.prompt for problem in make_problems(5000, seed=3)], []
    for number in (1000, 5000):
        builder = make_builder(tokenizer, max_new_tokens=2, max_tokens_per_batch=16384, prompts_per_shard=250)
        rows = read_rows(texts[:number], None, tokenizer)
        monkeypatch.setattr(builder, "_read", lambda *_, rows=rows: rows)
        monkeypatch.setattr(CleaningRules, "reason_to_drop", lambda *_: None)
        monkeypatch.setattr(builder_module, "find_duplicates", lambda _: set())
        tracemalloc.start()
        builder.collect(texts[:number], tmp_path / str(number))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert builder.counts["kept"] == number
    assert peaks[1] < 1.5 * peaks[0] < 4e6
