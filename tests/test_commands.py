"""`cllm collect`, `inspect`, `verify` and `push`: what is wrong is found before the work, the rest is passed on."""

import copy
import dataclasses
import json
import re
import subprocess
from pathlib import Path

import pytest
import torch
import transformers
from conftest import make_word_model
from datasets import Dataset, DatasetDict
from processes import TWO_PROCESSES

from cllm_hf import CleaningRules, TrajectoryBuilder, load_trajectories, set_jacobi_defaults
from cllm_hf.cli import main
from cllm_hf.demo.problems import make_problems
from cllm_hf.evaluation.command import tokenize
from cllm_hf.loading import load_tokenizer
from cllm_hf.show.picture import draw_blocks, token_decoder
from cllm_hf.show.terminal import BlockTrajectory
from cllm_hf.trajectories import command
from cllm_hf.trajectories.options import CollectArguments, CollectionOptions, parse_collect
from cllm_hf.trajectories.sources import apply_template, read_prompts, read_source


PROMPTS = [problem.prompt for problem in make_problems(12, seed=3)]
KINDS = (CollectArguments, CollectionOptions, CleaningRules)
NO_CLEANING = CleaningRules(max_token_run=None, max_sentence_repeats=None, drop_empty=False)
REQUIRED = ["--model", "m", "--output_dir", "o", "--prompts", "p"]


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / ".cache")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("models") / "target"
    model = make_word_model(tokenizer)
    set_jacobi_defaults(model, 8)  # as a CLLM has them
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dataset(tokenizer):
    options = {"block_size": 5, "max_new_tokens": 23, "cleaning": NO_CLEANING, "show_progress": False}
    return TrajectoryBuilder(make_word_model(tokenizer), tokenizer, **options).build(PROMPTS)


@pytest.fixture(scope="module")
def adapter_folder(model_folder, tokenizer):
    from peft import LoraConfig, get_peft_model

    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    options = {"target_modules": "all-linear", "init_lora_weights": False}
    get_peft_model(model, LoraConfig(**options)).save_pretrained(model_folder.parent / "adapter")
    tokenizer.save_pretrained(model_folder.parent / "adapter")
    return model_folder.parent / "adapter"


@pytest.fixture
def saved(dataset, model_folder, tmp_path):
    """A folder with two splits and what `inspect` and `verify` read of a manifest."""
    folder = tmp_path / "saved"
    DatasetDict(train=dataset.select(range(9)), test=dataset.select(range(9, 12))).save_to_disk(str(folder))
    model = {"name": str(model_folder), "revision": None, "dtype": "float32"}
    manifest = {"format": 1, "shards": {}, "complete": True, "model": model, "tokenizer": {"name": str(model_folder)}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def error_of(capsys):
    error = capsys.readouterr().err
    assert error.startswith("cllm: ") and error.count("\n") == 1
    return error


# The options of `collect`


def test_options_of_the_file_and_the_command_line(tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text(
        "model: m\noutput_dir: o\nprompts: p\nmax_new_tokens: 7\nwait: false\ntest_fraction: 0\nlimit: null\n"
    )
    for config in (["--config", str(file)], [f"--config={file}"]):
        arguments, collection, _ = parse_collect(config)
        assert (arguments.model, arguments.wait, arguments.limit) == ("m", False, None)
        assert collection.max_new_tokens == 7
    arguments, collection, _ = parse_collect(
        ["--config", str(file), "--max-new-tokens", "9", "--model=n", "--block_size", "4"]
    )
    assert (arguments.model, arguments.prompts) == ("n", "p")
    assert (collection.max_new_tokens, collection.block_size) == (9, 4)


def test_both_spellings_and_flags():
    with_hyphens = ["--no-wait", "--max-token-run", "0", "--augment", "--drop-duplicates", "false"]
    with_underscores = ["--no_wait", "--max_token_run", "0", "--augment", "true", "--no_drop_duplicates"]
    expected = (
        CollectArguments(model="m", output_dir="o", prompts="p", wait=False),
        CollectionOptions(augment=True, drop_duplicates=False),
        CleaningRules(max_token_run=None),
    )
    assert parse_collect([*REQUIRED, *with_hyphens]) == parse_collect([*REQUIRED, *with_underscores]) == expected


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["collect", "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and text.startswith("usage: cllm collect") and "--config FILE" in text
    for field in (field for kind in KINDS for field in dataclasses.fields(kind)):
        assert f"--{field.name}" in text and field.metadata["help"]
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(f"    {name} " in text for name in ("collect", "inspect", "verify", "push"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "m"], "required: --output_dir/--output-dir"),
        ([*REQUIRED, "--dtype", "half"], "invalid choice: 'half'"),
        ([*REQUIRED, "--block_size", "auto"], "invalid int value: 'auto'"),
        ([*REQUIRED, "--config"], "argument --config: expected one"),
        (["--config", "a", "--config=b"], "argument --config: expected one"),
    ],
)
def test_options_that_argparse_refuses(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        main(["collect", *arguments])
    assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (REQUIRED[:4], "Exactly one of `--prompts` and `--dataset-name` says what to ask, got neither"),
        ([*REQUIRED, "--dataset_name", "d"], "got both"),
        ([*REQUIRED, "--blocksize", "3"], "no such options, got --blocksize 3"),
        ([*REQUIRED, "--conf", "x.yaml"], "no such options, got --conf x.yaml"),
        ([*REQUIRED, "more"], "no such options, got more"),
        ([*REQUIRED, "--limit", "0"], "`limit` must be at least 1, got 0"),
        ([*REQUIRED, "--output_dir", ""], "`output_dir` must be a folder, got ''"),
        ([*REQUIRED, "--max_token_run", "-1"], "`max_token_run` must be an integer of at least 2"),
        ([*REQUIRED, "--max_token_run", "1"], "`max_token_run` must be an integer of at least 2"),
        ([*REQUIRED, "--block_size", "0"], "`block_size` must be an integer of at least 1, got 0"),
        ([*REQUIRED, "--seed", "-1"], "`seed` must be an integer of at least 0, got -1"),
        ([*REQUIRED, "--test_fraction", "1"], "`test_fraction` must be at least 0 and below 1, got 1.0"),
        ([*REQUIRED, "--prompt_template", "{question}"], "must have {prompt} where the prompt goes"),
        ([*REQUIRED, "--push_to_hub", "a/b", "--no_wait"], "Run `cllm push` afterwards"),
        (["--config", "missing.yaml"], "`--config` must be a file that can be read, got 'missing.yaml'"),
        (["--config", "."], "`--config` must be a file that can be read, got '.'"),
        (REQUIRED, "`--prompts` must be a file that can be read, got 'p'"),
        ([*REQUIRED[2:], "--model", "./none"], "`--model` must be a folder, .*'./none', which is not there"),
        ([*REQUIRED[:4], "--dataset_name", "./none"], "`dataset_name` must be a folder.*'./none', which is not there"),
    ],
)
def test_options_that_are_refused_before_anything_happens(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "load_tokenizer", None)  # nothing long has begun
    assert main(["collect", *arguments]) == 1
    assert re.search(message, error_of(capsys))
    assert not set(tmp_path.iterdir()) - {tmp_path / ".cache"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max-new-tokens: 3", "got --max-new-tokens 3.* their names have underscores"),
        ("blocksize: 3", "got --blocksize 3"),
        ("max_new_tokens: 1.5", "`max_new_tokens` must be of type int, got 1.5"),
        ("max_new_tokens: true", "`max_new_tokens` must be of type int, got True"),
        ("max_new_tokens: null", "`max_new_tokens` must be of type int, got None"),
        ("source: 7", "`source` must be of type str, got 7"),
        ("dtype: half", "`dtype` must be 'auto' or 'float32' or 'bfloat16' or 'float16', got 'half'"),
        ("augment: [1]", r"`augment` must be of type bool, got \[1\]"),
        ("model: [a", "must be YAML with options by name, got 'x.yaml'"),
        ("3: 4", "must be YAML with options by name, got 'x.yaml'"),
        ("- model", "must be YAML with options by name, got 'x.yaml'"),
        ("model: " + "[" * 400, "must be YAML with options by name, got 'x.yaml'"),
    ],
    ids=lambda value: value[:30],
)
def test_files_that_are_refused(tmp_path, monkeypatch, capsys, text, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.yaml").write_text(text)
    assert main(["collect", *REQUIRED, "--config", "x.yaml"]) == 1
    assert re.search(message, error_of(capsys))


def test_an_output_folder_that_cannot_be_written_is_found_before_the_model_is_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "load_tokenizer", None)
    (tmp_path / "prompts.txt").write_text("Mia\n")
    (tmp_path / "file").write_text("")
    arguments = ["--model", "m", "--prompts", str(tmp_path / "prompts.txt"), "--output_dir", str(tmp_path / "file")]
    assert main(["collect", *arguments]) == 1
    assert "output folder must be writable" in error_of(capsys)


def test_a_repository_that_cannot_be_pushed_to_is_found_before_the_model_is_loaded(tmp_path, monkeypatch, capsys):
    asked = []

    def refuse(repo_id, *args, **kwargs):
        asked.append(repo_id)
        raise ValueError("no token")

    monkeypatch.setattr(command, "load_tokenizer", None)
    monkeypatch.setattr(command, "check_can_push", refuse)
    (tmp_path / "prompts.txt").write_text("Mia\n")
    arguments = ["--model", "m", "--prompts", str(tmp_path / "prompts.txt"), "--output_dir", str(tmp_path / "out")]
    assert main(["collect", *arguments, "--push_to_hub", "user/name"]) == 1
    assert error_of(capsys) == "cllm: no token\n" and asked == ["user/name"]


# Prompts


def test_prompts_of_files(tmp_path):
    text, lines = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    text.write_text("one\n\ntwo\n")
    assert read_source(str(text), template="Q: {prompt}\\nA: {x}", limit=1) == (["Q: one\nA: {x}"], None)
    asked = [[{"role": "user", "content": f"Q: {word}"}] for word in ("one", "two")]
    assert read_source(str(text), template="Q: {prompt}", is_chat=True) == (asked, None)
    rows = [
        {"prompt": "a", "question": "b", "response": "r", "answer": "s"},
        {"prompt": "c", "question": "d", "response": "", "answer": "t"},
    ]
    lines.write_text("\n".join(map(json.dumps, rows)))
    assert read_source(str(lines)) == (["a", "c"], ["r", ""])
    assert read_source(str(lines), prompt_column="question", response_column="answer") == (["b", "d"], ["s", "t"])
    chat = [{"role": "user", "content": "hi"}]
    lines.write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in (chat, [3, 4])))
    assert read_source(str(lines)) == ([chat, [3, 4]], None)
    with pytest.raises(ValueError, match="`chat` takes prompts that are text, got token ids"):
        read_source(str(lines), is_chat=True)
    with pytest.raises(ValueError, match="that are text take a template, got `prompt_template` 'Q: "):
        read_source(str(lines), template="Q: {prompt}")
    assert apply_template("{prompt}{prompt}", "{x}\\n") == "{x}\\n{x}\\n"  # what a prompt says stays as it is


@pytest.mark.parametrize(
    ("text", "columns", "message"),
    [
        ('{"prompt": "a", "response": "b"}\n{"prompt": "c"}', {}, "Line 2 .* field `response`, got none. Give every"),
        ('{"prompt": "a"}', {"response_column": "answer"}, "Line 1 .* field `answer`, got none"),
        ('{"prompt": "a", "response": 3}', {"response_column": "response"}, "Line 1 .* field `response`"),
        ('{"prompt": "a"}\n\n{"question": "b"}', {"prompt_column": "prompt"}, "Line 3 .* in a field `prompt`, got"),
        ('{"prompt": [1, "a"]}', {}, "Line 1 .* in a field `prompt` or `question`"),
        ("plain", {"prompt_column": "question"}, "Only JSON lines have fields, got the field 'question'"),
    ],
)
def test_prompt_files_that_are_refused(tmp_path, text, columns, message):
    file = tmp_path / "prompts.txt"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_source(str(file), **columns)


def test_prompts_of_datasets(tmp_path):
    rows = [{"question": f"q{number}", "answer": f"a{number}"} for number in range(5)]
    expected = [row["question"] for row in rows]
    table = Dataset.from_list(rows)
    for name in ("rows.jsonl", "rows.csv", "rows.parquet"):
        folder = tmp_path / name.split(".")[1]
        folder.mkdir()
        getattr(table, {"jsonl": "to_json"}.get(folder.name, f"to_{folder.name}"))(str(folder / name))
        for dataset in (folder, folder / name):
            assert read_source(dataset=str(dataset)) == (expected, None)
    table.to_csv(str(tmp_path / "rows.tsv"), sep="\t")
    DatasetDict(train=table, test=table.select([3])).save_to_disk(str(tmp_path / "disk"))
    assert read_source(dataset=str(tmp_path / "rows.tsv"), limit=2) == (expected[:2], None)
    options = {"dataset": str(tmp_path / "disk"), "split": "test", "response_column": "answer", "limit": 7}
    assert read_source(**options) == (["q3"], ["a3"])
    Dataset.from_dict({"prompt_ids": [[1, 2]], "response_ids": [[3]]}).save_to_disk(str(tmp_path / "tokens"))
    columns = {"prompt_column": "prompt_ids", "response_column": "response_ids"}
    assert read_source(dataset=str(tmp_path / "tokens"), **columns) == ([[1, 2]], [[3]])
    chats = [[{"role": "user", "content": "hi"}]]
    Dataset.from_dict({"prompt": chats}).save_to_disk(str(tmp_path / "chats"))
    assert read_source(dataset=str(tmp_path / "chats")) == (chats, None)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (
            [{"text": "a"}],
            {},
            "columns text, got neither `prompt` nor `question`. Pass one of those as `prompt_column`",
        ),
        ([{"prompt": "a"}], {"prompt_column": "text"}, "got `text`. Pass one of those as `prompt_column`"),
        ([{"prompt": "a"}], {"response_column": "text"}, "got `text`. Pass one of those as `response_column`"),
        ([{"prompt": "a"}, {"prompt": None}], {}, "`prompt` of .* must hold text or token ids, got 'None' in row 1"),
        (
            [{"prompt": "a", "x": 3}],
            {"response_column": "x"},
            "`x` of .* must hold text or token ids, got '3' in row 0",
        ),
        ([{"prompt": "a"}], {"split": "test"}, "test"),
        ([], {}, "must hold at least one prompt, got the empty file"),
        ([{"prompt": "a"}], {"limit": 0}, "must hold at least one prompt, got none in the split 'train'"),
    ],
)
def test_datasets_of_prompts_that_are_refused(tmp_path, rows, options, message):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=message) as caught:
        read_source(dataset=str(file), **options)
    assert "\n" not in str(caught.value)


def test_files_of_other_kinds_are_no_datasets(tmp_path):
    (tmp_path / "rows.xml").write_text("<a/>")
    with pytest.raises(ValueError, match="`dataset_name` must be a file of one of the kinds .json, .*rows.xml"):
        read_source(dataset=str(tmp_path / "rows.xml"))
    (tmp_path / "deep.jsonl").write_text('{"prompt": ' + "[" * 50_000 + "]" * 50_000 + "}")
    (tmp_path / "half.jsonl").write_text('{"prompt": "a"}\n{"prompt": "\\ud83d"}\n')
    (tmp_path / "cut.csv").write_bytes(b"\x1f\x8b\x00")
    for name, reason in (
        ("deep.jsonl", "nested too deeply"),
        ("half.jsonl", "surrogate pair"),
        ("cut.csv", "ended before"),
    ):
        with pytest.raises(ValueError, match=f"{name}' could not be loaded .*{reason}"):
            read_source(dataset=str(tmp_path / name))
    with pytest.raises(OSError, match="'user/none' could not be loaded"):
        read_source(dataset="user/none")


# Collecting


class RecordingBuilder:
    """Remembers what it was made with and asked for."""

    seen: dict

    def __init__(self, model, **options):
        type(self).seen = {"model": model, **options}

    def collect(self, prompts, output_dir, **options):
        self.seen.update(prompts=prompts, output_dir=output_dir, **options)
        return self.is_complete

    is_complete = False


@pytest.fixture
def recording(monkeypatch):
    monkeypatch.setattr(command, "TrajectoryBuilder", RecordingBuilder)
    return RecordingBuilder


def test_all_options_reach_the_builder(recording, model_folder, tmp_path, capsys):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "Mia", "response": "has"}\n{"prompt": "Ben", "response": "buys"}\n')
    arguments = ["--model", str(model_folder), "--prompts", str(file), "--output_dir", str(tmp_path / "out")]
    arguments += ["--block_size", "4", "--max_new_tokens", "9", "--seed", "3", "--max_tokens_per_batch", "64"]
    arguments += ["--prompts_per_shard", "5", "--augment", "--test_fraction", "0.25", "--max_token_run", "0"]
    arguments += ["--max_sentence_repeats", "2", "--no_drop_empty", "--drop_truncated", "--max_prompt_tokens", "8"]
    arguments += ["--no_drop_duplicates", "--not_greedy", "keep", "--source", "here", "--license", "mit", "--no_wait"]
    arguments += ["--dtype", "bfloat16", "--attn_implementation", "eager", "--prompt_template", "{prompt} ."]
    assert main(["collect", *arguments]) == 0
    assert "The part of this process is done" in capsys.readouterr().out
    model, tokenizer, cleaning = (recording.seen.pop(name) for name in ("model", "processing_class", "cleaning"))
    assert model.dtype == torch.bfloat16 and model.config._attn_implementation == "eager" and not model.training
    assert tokenizer("Mia has")["input_ids"] and cleaning.to_dict() == {
        **{"max_token_run": None, "max_sentence_repeats": 2, "drop_empty": False},
        **{"drop_truncated": True, "max_prompt_tokens": 8},
    }
    assert recording.seen == {
        **{"block_size": 4, "max_new_tokens": 9, "seed": 3, "max_tokens_per_batch": 64, "prompts_per_shard": 5},
        **{
            "augment": True,
            "test_fraction": 0.25,
            "drop_duplicates": False,
            "not_greedy": "keep",
            "responses_only": False,
        },
        **{"show_progress": False, "prompts": ["Mia .", "Ben ."], "responses": ["has", "buys"]},
        **{"output_dir": tmp_path / "out", "source": "here", "license": "mit", "wait": False, "revision": None},
    }


def test_a_revision_is_not_for_adapters(adapter_folder):
    with pytest.raises(ValueError, match="`revision` is that of a whole model, got 'v2' for the adapter"):
        command.load_model(str(adapter_folder), "float32", None, revision="v2")


def test_an_adapter_may_have_the_tokenizer_of_the_model_below_it(adapter_folder, model_folder, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "adapter_config.json").write_bytes((adapter_folder / "adapter_config.json").read_bytes())
    assert load_tokenizer(str(bare), None, False).name_or_path == str(model_folder)
    (bare / "adapter_config.json").unlink()
    with pytest.raises(OSError, match="There must be a model with its tokenizer at .*bare'") as caught:
        load_tokenizer(str(bare), None, False)
    assert "\n" not in str(caught.value)


def test_interrupted_collections_can_go_on(recording, model_folder, tmp_path, monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(recording, "collect", interrupt)
    (tmp_path / "prompts.txt").write_text("Mia\n")
    arguments = ["--prompts", str(tmp_path / "prompts.txt"), "--output_dir", str(tmp_path / "out")]
    assert main(["collect", "--model", str(model_folder), *arguments]) == 130
    assert "the same command continues where it was" in capsys.readouterr().err


# Looking


def test_inspect_shows_a_record(saved, dataset, capsys):
    assert main(["inspect", str(saved)]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"`data_id` {dataset[0]['data_id']}: ") and "\033" not in text
    assert text.count("Block ") == len(dataset[0]["states"]) and dataset[0]["response"].split()[-1] in text
    assert main(["inspect", str(saved), "--record", "10", "--block", "0"]) == 0
    last = capsys.readouterr().out
    assert last.startswith(f"`data_id` {dataset[10]['data_id']}: ") and last.count("Block ") == 1
    assert main(["inspect", str(saved), "--data-id", dataset[10]["data_id"], "--block", "0"]) == 0
    assert capsys.readouterr().out == last
    assert main(["inspect", str(saved), "--split", "test", "--record", "1", "--block", "0", "--no-color"]) == 0
    assert capsys.readouterr().out == last


def test_inspect_colors_for_a_terminal(saved, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    for arguments, expected in (([], True), (["--no-color"], False)):
        assert main(["inspect", str(saved), *arguments]) == 0
        assert ("\033[34m" in capsys.readouterr().out) == expected
    monkeypatch.setenv("NO_COLOR", "1")
    assert main(["inspect", str(saved)]) == 0
    assert "\033" not in capsys.readouterr().out


def test_inspect_without_a_tokenizer_shows_ids(saved, dataset, model_folder, capsys):
    manifest = json.loads((saved / "manifest.json").read_text())
    manifest["tokenizer"]["name"] = "user/none"
    (saved / "manifest.json").write_text(json.dumps(manifest))
    assert main(["inspect", str(saved), "--block", "0"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("Tokens are shown by their ids: there is no tokenizer (")
    assert text.splitlines()[-1].split()[1:] == [str(token) for token in dataset[0]["response_ids"][:5]]
    (saved / "manifest.json").unlink()
    assert main(["inspect", str(saved), "--block", "0"]) == 0
    assert "(the dataset does not name one)" in capsys.readouterr().out
    assert main(["inspect", str(saved), "--block", "0", "--tokenizer", str(model_folder)]) == 0
    assert capsys.readouterr().out.startswith("`data_id` ")


def test_inspect_shows_statistics(saved, tmp_path, capsys):
    assert main(["inspect", str(saved), "--statistics"]) == 0
    text = capsys.readouterr().out
    assert "| block size 5" in text and "12 |" in text and "█" in text
    plot = tmp_path / "plots" / "both.png"
    assert main(["inspect", str(saved), "--compare", str(saved), "--plot", str(plot)]) == 0
    text = capsys.readouterr().out
    assert "before" in text and "1.00x" in text and f"Written: {plot}" in text
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_inspect_draws_blocks(saved, dataset, tokenizer, tmp_path, capsys):
    files = [tmp_path / f"{number}.png" for number in range(2)]
    place = max(range(len(dataset)), key=lambda number: len(dataset[number]["states"]))
    record = dataset[place]
    assert len(record["states"]) > 1
    for file, blocks in zip(files, ([], ["--block", "1", "0"])):
        assert main(["inspect", str(saved), "--record", str(place), "--picture", str(file), *blocks]) == 0
        assert capsys.readouterr().out.endswith(f"\n\nWritten: {file}\n")
    expected = [BlockTrajectory.of(record, number, f"Block {number}") for number in (1, 0)]
    title, caption = f"`data_id` {record['data_id']}", f"Prompt: {record['prompt']}"
    decode = token_decoder(tokenizer)
    assert files[1].read_bytes() == draw_blocks(expected, decode, title, caption)
    assert files[0].read_bytes() == draw_blocks(expected[1:], decode, title, caption)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--record", "12"], "`--record` must be from 0 to 11, got 12"),
        (["--data-id", "x"], "got 'x', which none of 12 has"),
        (["--block", "9"], "`blocks` must be from 0 to"),
        (["--block", "0", "--statistics"], "got `--block` with `--statistics`"),
        (["--data-id", "1", "--plot", "x.png"], "got `--data-id` with"),
        (["--picture", "x.png", "--statistics"], "got `--picture` with"),
        (["--tokenizer", "./none"], "`--tokenizer` must be that of the dataset, got './none'"),
        (["--split", "dev"], "'dev'"),
        (["--statistics", "--plot", "."], "must be a file, got the folder"),
    ],
)
def test_inspect_refuses(saved, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(saved.parent)
    assert main(["inspect", str(saved), *arguments]) == 1
    assert message in error_of(capsys)


def test_inspect_of_what_is_not_there(tmp_path, capsys):
    assert main(["inspect", str(tmp_path)]) == 1
    assert main(["inspect", str(tmp_path / "none")]) == 1
    assert capsys.readouterr().err.count("cllm: ") == 2


# Verifying


def test_verify_recomputes_with_the_model_of_the_dataset(saved, capsys):
    assert main(["verify", str(saved), "--transitions", "60"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("60 of ") and "seed 0, were recomputed by plain forward passes: 60 hold, 0 do not." in text


def test_verify_finds_what_does_not_hold(saved, tmp_path, tokenizer, capsys):
    other = tmp_path / "other"
    make_word_model(tokenizer, "gpt2").save_pretrained(other)
    arguments = ["--model", str(other), "--dtype", "bfloat16", "--seed", "3", "--split", "test", "--device", "cpu"]
    assert main(["verify", str(saved), *arguments]) == 1
    text = capsys.readouterr().out
    assert text.startswith("All ") and "fewer than the 1000 asked for" in text and "| data_id " in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "./none"], "on the Hub such as 'user/name', got './none', which is not there"),
        (["--device", "tpu9"], "must be a device of this machine, got 'tpu9'"),
        (["--split", "dev"], "'dev'"),
    ],
)
def test_verify_refuses(saved, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(command, "load_model", None)
    assert main(["verify", str(saved), *arguments]) == 1
    assert message in error_of(capsys)


def test_verify_needs_to_know_the_model(saved, capsys):
    manifest = json.loads((saved / "manifest.json").read_text())
    manifest["model"]["name"] = "/moved/away"
    (saved / "manifest.json").write_text(json.dumps(manifest))
    assert main(["verify", str(saved)]) == 1
    assert "was made by the model /moved/away, which is not there. Pass it as `--model`" in error_of(capsys)
    (saved / "manifest.json").unlink()
    assert main(["verify", str(saved)]) == 1
    assert "does not say which model it was made by. Pass it as `--model`" in error_of(capsys)
    with pytest.raises(SystemExit):
        main(["verify", str(saved), "--transitions", "0"])
    assert "integer of at least 1" in capsys.readouterr().err


# Pushing


def test_push_passes_everything_on(tmp_path, monkeypatch, capsys):
    seen = []

    def push(folder, repo_id, **options):
        seen.append((folder, repo_id, options))
        return "https://hub/user/name"

    monkeypatch.setattr(command, "push_trajectories", push)
    assert main(["push", str(tmp_path), "user/name", "--private", "--config-name", "math", "--revision", "dev"]) == 0
    assert capsys.readouterr().out == "Published: https://hub/user/name\n"
    assert seen == [(tmp_path, "user/name", {"private": True, "config_name": "math", "revision": "dev"})]


def test_push_of_what_is_no_dataset(tmp_path, capsys):
    assert main(["push", str(tmp_path), "user/name"]) == 1
    assert "manifest.json" in error_of(capsys)


# From prompts to a checked dataset


@pytest.fixture
def collect_arguments(model_folder, tmp_path):
    file = tmp_path / "options.yaml"
    (tmp_path / "prompts.txt").write_text("\n".join([*PROMPTS, PROMPTS[0]]))
    lines = [f"model: {model_folder}", f"prompts: {tmp_path / 'prompts.txt'}", f"output_dir: {tmp_path / 'out'}"]
    lines += ["block_size: 5", "max_new_tokens: 23", "max_token_run: 0", "max_sentence_repeats: null"]
    file.write_text("\n".join([*lines, "drop_empty: false", "prompts_per_shard: 4"]))
    return ["collect", "--config", str(file)]


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_chat_is_a_chat_message(collect_arguments, model_folder, tokenizer, tmp_path, capsys):
    """A text with `--chat`, and the same as a message in a file; the benchmark decodes the same tokens."""
    tokenizer = copy.deepcopy(tokenizer)  # which other tests share
    tokenizer.chat_template = "{% for m in messages %}Mia has {{ m['content'] }} {% endfor %}"
    tokenizer.save_pretrained(model_folder)
    lines = [json.dumps({"prompt": [{"role": "user", "content": text}]}) for text in [*PROMPTS, PROMPTS[0]]]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines))
    assert main([*collect_arguments, "--chat"]) == 0
    messages = ["--prompts", str(tmp_path / "chats.jsonl"), "--output-dir", str(tmp_path / "messages")]
    assert main([*collect_arguments, *messages]) == 0
    records = load_trajectories(tmp_path / "out")[:]
    assert records == load_trajectories(tmp_path / "messages")[:]
    assert records["prompt_ids"] == tokenize(tokenizer, PROMPTS, is_chat=True)
    messages = read_prompts(tmp_path / "chats.jsonl", limit=len(PROMPTS))
    assert records["prompt_ids"] == tokenize(tokenizer, messages) == tokenize(tokenizer, messages, is_chat=True)
    assert records["prompt"][0] == f"Mia has {PROMPTS[0]} "


def test_responses_that_are_mostly_empty_have_a_hint(tmp_path):
    manifest = {"counts": {"kept": 1, "empty": 9}, "prompts": {"count": 10}, "statistics": {}, "options": {}}
    assert "`--chat`" in command.format_collection(tmp_path, manifest)
    manifest["counts"] = {"kept": 9, "empty": 1}
    assert "`--chat`" not in command.format_collection(tmp_path, manifest)


def test_what_is_collected_can_be_inspected_and_verified(collect_arguments, dataset, tokenizer, tmp_path, capsys):
    assert main(collect_arguments) == 0
    text = capsys.readouterr().out
    folder = tmp_path / "out"
    assert text.startswith("Kept 12 of 13 prompts; dropped: 1 duplicate.\n") and "| block size 5" in text
    assert f"`cllm inspect {folder}`" in text and f"`cllm verify {folder}`" in text and f"cllm push {folder}" in text
    records = command.load_trajectories(folder)
    assert records["states"] == dataset["states"] and records["response_ids"] == dataset["response_ids"]

    assert main(["inspect", str(folder), "--data-id", "7"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("`data_id` 7: ") and records[7]["response"] in shown
    assert main(["inspect", str(folder), "--statistics"]) == 0
    assert capsys.readouterr().out.startswith(text.split("\n\n")[1])
    assert main(["verify", str(folder)]) == 0
    assert " hold, 0 do not." in capsys.readouterr().out

    make_word_model(tokenizer, "gpt2").save_pretrained(tmp_path / "other")
    assert main(["verify", str(folder), "--model", str(tmp_path / "other")]) == 1
    assert "The weights are not those that the dataset was built with" in capsys.readouterr().out

    files = files_of(folder)
    assert main(collect_arguments) == 0  # there is nothing left to do
    assert capsys.readouterr().out == text and files_of(folder) == files
    assert main([*collect_arguments, "--seed", "1"]) == 1  # another collection does not mix with it
    assert "seed" in capsys.readouterr().err
    assert files_of(folder) == files


def test_adapters_collect_and_are_found_again(collect_arguments, adapter_folder, tmp_path, capsys):
    assert main([*collect_arguments, "--model", str(adapter_folder), "--limit", "4"]) == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["model"]["name"] == str(adapter_folder) and manifest["counts"]["kept"] == 4
    assert main(["verify", str(tmp_path / "out")]) == 0
    assert " hold, 0 do not." in capsys.readouterr().out


def test_given_responses_are_read_and_prompts_held_out(collect_arguments, dataset, tmp_path, capsys):
    rows = [{"question": record["prompt"], "response": record["response"]} for record in dataset]
    rows[3]["response"] = "Eva has 7 Eva has 7"
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = [*collect_arguments, "--prompts", str(tmp_path / "prompts.jsonl"), "--test_fraction", "0.5"]
    assert main([*arguments, "--not_greedy", "keep", "--augment"]) == 0
    text = capsys.readouterr().out
    assert re.match(r"Kept \d+ of 12 prompts \(\d+ of them not greedy\); dropped: ", text)
    assert main(["verify", str(tmp_path / "out")]) == 0
    assert main(["inspect", str(tmp_path / "out"), "--data-id", "3"]) == 0
    assert "not all of it greedy" in capsys.readouterr().out


def test_the_last_of_several_processes_completes_the_dataset(collect_arguments, tmp_path, monkeypatch, capsys):
    assert main(collect_arguments) == 0
    alone, text = files_of(tmp_path / "out"), capsys.readouterr().out
    monkeypatch.setenv("WORLD_SIZE", "2")
    arguments = [*collect_arguments, "--no_wait", "--output_dir", str(tmp_path / "shared")]
    outputs = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert main(arguments) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0].startswith("The part of this process is done.")
    assert outputs[1] == text.replace(str(tmp_path / "out"), str(tmp_path / "shared"))
    assert files_of(tmp_path / "shared") == alone


@pytest.mark.slow
def test_torchrun_makes_the_same_bytes(collect_arguments, tmp_path, capsys):
    assert main(collect_arguments) == 0
    launcher = [*TWO_PROCESSES, "-m", "cllm_hf"]
    together = tmp_path / "together"
    run = subprocess.run(
        [*launcher, *collect_arguments, "--output_dir", str(together)], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    assert files_of(together) == files_of(tmp_path / "out")
    # The first process alone says what came out.
    assert run.stdout == capsys.readouterr().out.replace(str(tmp_path / "out"), str(together))


def test_a_finished_dataset_is_pushed(collect_arguments, tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(command, "check_can_push", lambda repo_id, **options: calls.append(repo_id))
    monkeypatch.setattr(
        command, "push_trajectories", lambda folder, repo_id, **options: calls.append((folder, repo_id, options))
    )
    assert main([*collect_arguments, "--push_to_hub", "user/name", "--private", "--config_name", "math"]) == 0
    options = {"private": True, "config_name": "math"}
    assert calls == ["user/name", (tmp_path / "out", "user/name", options)]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")  # the others leave that to the first
    assert main([*collect_arguments, "--push_to_hub", "user/name"]) == 0
    assert len(calls) == 3 and capsys.readouterr().out.count("Kept ") == 1


def test_options_are_spelled_with_dashes_or_underscores(monkeypatch):
    seen = []
    monkeypatch.setattr("cllm_hf.cli._run_demo", lambda parsed: seen.append((parsed.output_dir, parsed.no_color)) or 0)
    for arguments in (["--output-dir", "a_b", "--no-color"], ["--output_dir=a_b", "--no_color"]):
        assert main(["demo", *arguments]) == 0
    assert seen == [(Path("a_b"), True)] * 2
