"""Both trainers are fed as many tokens, and the table says so; nothing looks at a time."""

import json

import pytest
import torch
from benchmarks.command import main
from benchmarks.sft_comparison import ONLINE, SFT, STORED, compare_with_sft, format_sft
from benchmarks.training_methods import TrainingSetting, random_trajectories
from conftest import VOCAB_SIZE, make_model
from datasets import Dataset

from cllm_hf.trajectories.schema import RESPONSE_COLUMNS


BLOCK_SIZE = 5


@pytest.fixture(scope="module")
def records():
    return random_trajectories(VOCAB_SIZE, 6, prompt_length=9, response_length=17, block_size=BLOCK_SIZE, seed=3)


def compare(model, tokenizer, records, **options):
    setting = TrainingSetting(**{"batch_size": 1, "steps": 2, "rounds": 1, **options})
    return compare_with_sft(model, tokenizer, records, BLOCK_SIZE, setting, show_progress=False)


def test_all_ways_feed_the_same_number_of_tokens(tokenizer, records):
    model, fed = make_model("llama"), []

    def count(module, inputs, output):
        if torch.is_grad_enabled():  # neither online states nor targets
            fed.append(output.shape[1])

    model.get_input_embeddings().register_forward_hook(count)
    report = json.loads(json.dumps(compare(model, tokenizer, records)))
    lengths = [
        len(record["prompt_ids"]) + len(record["response_ids"]) + sum(len(states[0]) for states in record["states"])
        for record in records[:3]
    ]
    assert report["lengths"] == lengths
    assert [row["name"] for row in report["rows"]] == [SFT, STORED, ONLINE]
    steps = [sorted(fed[start : start + 3]) for start in (0, 3, 6)]
    assert len(fed) == 9 and steps == [sorted(lengths)] * 3
    assert all(len(row["seconds"]) == 2 for row in report["rows"])
    assert report["rows"][0]["throughput_over_sft"] == 1.0
    assert f"of {min(lengths)} to {max(lengths)} tokens" in format_sft(report)


def without_states(records):
    return [{name: record[name] for name in RESPONSE_COLUMNS} for record in records]


def test_responses_without_states_have_no_row_of_states(tokenizer, records):
    plain = without_states(records)
    model = make_model("llama").eval()
    report = compare(model, tokenizer, plain, batch_size=2)
    assert [row["name"] for row in report["rows"]] == [SFT, ONLINE] and not model.training
    with pytest.raises(ValueError, match="takes 8 records, got 6"):
        compare(model, tokenizer, plain, batch_size=2, steps=3)


def test_the_command(tmp_path, capsys):
    sizes = ["--prompt-length", "6", "--response-length", "8", "--block-size", "4", "--batch-size", "1"]
    options = ["--steps", "1", "--rounds", "1", "--json", str(tmp_path / "sft.json")]
    assert main(["sft", "--shape", "4m", *sizes, *options]) == 0
    assert "| SFTTrainer" in capsys.readouterr().out
    assert json.loads((tmp_path / "sft.json").read_text())["kind"] == "sft"
    assert main(["sft", "--model", "nowhere", *options]) == 1
    assert "Pass a folder that `cllm collect` has written" in capsys.readouterr().err


@pytest.mark.slow
def test_blocks_are_as_long_as_the_states_or_as_an_option_says(tokenizer, records, tmp_path, capsys):
    make_model("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    Dataset.from_list(records).save_to_disk(tmp_path / "states")
    Dataset.from_list(without_states(records)).save_to_disk(tmp_path / "plain")
    options = ["--batch-size", "1", "--steps", "1", "--rounds", "1", "--json", str(tmp_path / "sft.json")]

    def run(name, *given):
        folders = ["--model", str(tmp_path / "model"), "--trajectories", str(tmp_path / name)]
        return main(["sft", *folders, *options, *given])

    for name, given, expected in (("plain", ["--block-size", "4"], 4), ("plain", [], 16), ("states", [], BLOCK_SIZE)):
        assert run(name, *given) == 0
        assert json.loads((tmp_path / "sft.json").read_text())["settings"]["block_size"] == expected
    assert run("states", "--block-size", "4") == 1
    assert "Every state must have `block_size` tokens, 4, got lengths [5]" in capsys.readouterr().err
