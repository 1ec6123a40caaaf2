"""The published procedure records what the builder records, and what is counted is right; nothing looks at a time."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from benchmarks import collection, collectors, command
from benchmarks.collection import CollectionResult, compare_collection, format_collection, measure_collection
from benchmarks.collectors import CollectionMethod, CollectionSetting
from benchmarks.command import main
from benchmarks.number_tokenizer import make_number_tokenizer
from benchmarks.published import collect_one_by_one
from conftest import CONFIGS, VOCAB_SIZE, make_model, make_word_model
from peft import LoraConfig, get_peft_model

from cllm_hf import TrajectoryBuilder, set_jacobi_defaults
from cllm_hf.demo.problems import make_problems
from cllm_hf.evaluation import benchmark, shapes
from cllm_hf.evaluation.benchmark import PeakMemory
from cllm_hf.trajectories.collector import draw_first_states


SETTING = CollectionSetting(block_size=5, max_new_tokens=23, seed=3)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def texts():
    return [problem.prompt for problem in make_problems(8, seed=3)] + ["Mia", "Ben has 3 apples ."]


@pytest.fixture(autouse=True)
def no_garbage(monkeypatch):
    """Looking for garbage takes a large process a third of a second each time."""
    monkeypatch.setattr(benchmark, "gc", SimpleNamespace(collect=lambda: None))


@pytest.fixture
def tiny_shape(monkeypatch):
    tiny = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    monkeypatch.setitem(shapes.SHAPES, "4m", {**tiny, "vocab_size": VOCAB_SIZE})


def draw(prompt, length=23, block_size=5, seed=(3, 0)):
    return draw_first_states(prompt, length, block_size, 0, seed)


# The published procedure


@pytest.mark.parametrize("name", CONFIGS)
def test_the_published_procedure_records_what_the_builder_records(name, tokenizer, texts):
    """The builder packs blocks after a cache and keeps what ends in `generate`; here nothing of that is used."""
    model = make_word_model(tokenizer, name)
    builder = collectors._make_builder(model, tokenizer, SETTING)
    records = {row["data_id"]: row for row in builder.build(texts)}
    assert len(records) >= len(texts) - 1
    for index, row in records.items():
        drafts = draw(row["prompt_ids"], seed=(3, int(index)))
        stops = model.generation_config.eos_token_id
        response, states = collect_one_by_one(model, row["prompt_ids"], drafts, 23, stops, tokenizer.pad_token_id)
        assert response == row["response_ids"] and states == row["states"]
    lengths = {len(row["response_ids"]) for row in records.values()}
    assert len(lengths) > 1 or name == "mixtral", "some responses must end early for this test to say something"


@pytest.mark.parametrize("prompt", [[7], [3, 4, 5], list(range(3, 50))])
def test_drafts_of_a_long_response_begin_with_those_of_a_short_one(prompt):
    long = draw(prompt, length=64, block_size=8).flatten()
    for length in (1, 8, 21, 64):
        assert draw(prompt, length=length, block_size=8).flatten()[:length].tolist() == long[:length].tolist()


@pytest.mark.parametrize("max_new_tokens", [1, 5, 12])
def test_every_iteration_is_a_forward_over_everything_without_a_cache(llama, max_new_tokens):
    prompt, seen = [5, 9, 13], []

    def look(module, args, kwargs, output):
        seen.append(args[0].shape[1])
        assert kwargs == {"use_cache": False} and output.past_key_values is None
        assert output.logits.shape[:2] == args[0].shape

    llama.register_forward_hook(look, with_kwargs=True)
    response, states = collect_one_by_one(llama, prompt, draw(prompt), max_new_tokens, [], 0)
    assert len(response) == max_new_tokens and [len(state) for block in states for state in block].count(5) == len(
        seen
    )
    ends = [min(5 * number, max_new_tokens) for number in range(1, len(states) + 1)]
    # As many forward passes as states: the last one finds no more than the fixed point once more.
    assert seen == [3 + end for end, block in zip(ends, states) for _ in block]


def test_what_changes_behind_the_stop_token_is_not_a_state(llama):
    """The model counts up, so that every iteration makes one more token right, also after the stop token 7."""

    def count_up(module, args, kwargs, output):
        output.logits = torch.nn.functional.one_hot((args[0] + 1) % VOCAB_SIZE, VOCAB_SIZE).float()
        return output

    llama.register_forward_hook(count_up, with_kwargs=True)
    drafts = np.full((2, 5), 30)
    response, states = collect_one_by_one(llama, [5], drafts, 10, [7], pad_id=0)
    assert response == [6, 7] and states == [[[30, 30, 0, 0, 0], [6, 31, 0, 0, 0], [6, 7, 0, 0, 0]]]
    response, states = collect_one_by_one(llama, [5], drafts, 7, [], pad_id=0)
    assert response == [6, 7, 8, 9, 10, 11, 12] and len(states[0]) == 6
    assert states[1] == [[30, 30, 0, 0, 0], [11, 31, 0, 0, 0], [11, 12, 0, 0, 0]]


def test_two_near_ties_do_not_take_turns_for_ever(llama):
    turns = []

    def flip(module, args, kwargs, output):
        turns.append(len(turns) % 2)
        output.logits = torch.nn.functional.one_hot(torch.full_like(args[0], 8 + turns[-1]), VOCAB_SIZE).float()
        return output

    llama.register_forward_hook(flip, with_kwargs=True)
    response, states = collect_one_by_one(llama, [5], np.full((1, 4), 30), 4, [], 0)
    assert len(turns) == 5 and response == states[0][-1] == [8] * 4


def test_too_few_drafts_are_refused(llama):
    with pytest.raises(ValueError, match="a draft of each of 5 blocks, got 4. Draw them for `max_new_tokens=23`"):
        collect_one_by_one(llama, [5], np.zeros((4, 5), int), 23, [], 0)


# Memory


def test_peak_memory_is_above_what_was_there_and_of_the_whole_time():
    before = np.ones(100 * 2**20, np.uint8)
    with PeakMemory(CPU) as peak:
        np.ones(200 * 2**20, np.uint8)
    if peak.num_bytes is None:
        pytest.skip("this system does not say")
    with PeakMemory(CPU) as little:
        pass
    with PeakMemory(CPU) as freed:
        del before
        np.ones(50 * 2**20, np.uint8)
    assert 190 * 2**20 < peak.num_bytes < 260 * 2**20
    assert 0 <= little.num_bytes < 20 * 2**20 and freed.num_bytes < 20 * 2**20


def test_peak_memory_of_a_cuda_device_is_that_of_tensors(monkeypatch):
    calls = []
    for name, value in (("reset_peak_memory_stats", None), ("memory_allocated", 100), ("max_memory_allocated", 350)):
        monkeypatch.setattr(torch.cuda, name, lambda device, name=name, value=value: calls.append(name) or value)
    with PeakMemory(torch.device("cuda", 0)) as peak:
        calls.append("work")
    assert peak.num_bytes == 250
    assert calls == ["reset_peak_memory_stats", "memory_allocated", "work", "max_memory_allocated"]


def test_no_peak_memory_where_nobody_can_say(monkeypatch, tmp_path):
    with PeakMemory(torch.device("meta")) as peak:
        pass
    assert peak.num_bytes is None
    for folder in (tmp_path, tmp_path / "none"):
        monkeypatch.setattr(benchmark, "_PROCESS", folder)
        with PeakMemory(CPU) as peak:
            pass
        assert peak.num_bytes is None


# Counting


def result(responses, states, seconds, name="", peak=None):
    trajectories = {index: pair for index, pair in enumerate(zip(responses, states))}
    method = CollectionMethod(name, len(responses), None, None)
    return CollectionResult(method, trajectories, {}, seconds, peak)


def test_tokens_of_responses_and_states():
    slow = result([[1, 2, 3]], [[[[8, 8], [1, 2]], [[8, 0], [4, 0], [3, 0]]]], [3.0, 6.0, 3.0])
    assert slow.num_tokens == 3 and slow.num_state_tokens == 2 * 2 + 3 * 1 and slow.tokens_per_second == 1.0
    fast = result([[1, 2, 3], [4]], [[[[1, 2]], [[3, 0]]], [[[4, 0]]]], [1.0, 1.0, 1.0])
    assert fast.tokens_per_second == 4.0 and fast.speedup_over(slow) == 4.0 and fast.num_equal_to(slow) == 0
    del slow.trajectories[0]
    assert slow.tokens_per_second == 0.0


def test_equal_are_the_records_of_both():
    states = [[[[1, 2]]], [[[4, 0]]], [[[5, 0]]]]
    published = result([[1, 2], [4], [5]], states, [1.0])
    builder = result([[1, 2], [4], [5]], [states[0], [[[3, 0], [4, 0]]], states[2]], [1.0])
    assert builder.num_equal_to(published) == 2 and published.num_equal_to(published) == 3
    del builder.trajectories[2]
    assert builder.num_equal_to(published) == 1


def test_methods_take_turns_and_begin_with_short_responses():
    calls = []

    def collect(name):
        return lambda setting: calls.append((name, setting.max_new_tokens)) or len(calls)

    def read(collected):
        return {0: ([collected], [[[collected]]])}, {"mismatch": 1}

    methods = [CollectionMethod(name, 1, collect(name), read) for name in "ab"]
    results = measure_collection(methods, CollectionSetting(block_size=4, max_new_tokens=20), 2, CPU)
    assert calls == [("a", 8), ("b", 8)] + 2 * [("a", 20), ("b", 20)]
    assert [len(result.seconds) for result in results] == [2, 2]
    assert [result.trajectories[0][0] for result in results] == [[3], [4]]  # of the first round
    assert all(result.dropped == {"mismatch": 1} for result in results)


# The report


def compare(model, tokenizer, texts, **options):
    options = {"num_published": 3, "rounds": 1, "show_progress": False, **options}
    return compare_collection(model, tokenizer, texts, SETTING, **options)


def test_both_ways_record_the_same(word_model, tokenizer, texts):
    word_model.train()
    report = json.loads(json.dumps(compare(word_model, tokenizer, texts, response_lengths=[4, 9], block_sizes=[3])))
    assert word_model.training
    assert [(row["name"], row["num_prompts"]) for row in report["rows"]] == [
        ("published procedure", 3),
        ("TrajectoryBuilder", 3),
        ("TrajectoryBuilder", len(texts)),
    ]
    published, few, everything = report["rows"]
    assert published["num_equal"] == few["num_equal"] == everything["num_equal"] == 3
    for key in ("num_tokens", "num_state_tokens"):
        assert published[key] == few[key] < everything[key]
    assert published["speedup"] == 1.0 and published["dropped"] == {}
    assert [point["max_new_tokens"] for point in report["response_lengths"]] == [4, 9]
    assert [(point["block_size"], point["max_new_tokens"]) for point in report["block_sizes"]] == [(3, 23)]
    for point in report["response_lengths"] + report["block_sizes"]:
        assert [row["num_prompts"] for row in point["rows"]] == [1, len(texts)] and point["rows"][1]["num_equal"] == 1
    text = format_collection(report)
    assert text.count("3/3") == 3 and text.count("1/1") == 3
    assert "Longer responses, published procedure on 1 and TrajectoryBuilder on 10 prompts:" in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 5 + 4 + 3 and "Dropped" not in text


def test_adapters_are_measured_too(tokenizer, texts):
    base = make_model("llama", vocab_size=len(tokenizer))
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)).eval()
    report = compare(model, tokenizer, texts[:2])
    assert [row["num_equal"] for row in report["rows"]] == [2, 2]  # no third row for the same prompts
    with model.disable_adapter():
        without = compare(model, tokenizer, texts[:2])
    assert without["rows"][0]["num_state_tokens"] != report["rows"][0]["num_state_tokens"]


def test_what_is_dropped_is_said(word_model, tokenizer, texts, monkeypatch):
    build = TrajectoryBuilder.build

    def forget(self, prompts):
        dataset = build(self, prompts)
        self.counts = Counter(kept=len(dataset) - 1, mismatch=1, kept_not_greedy=1, duplicate=0)
        return dataset.select(range(1, len(dataset)))

    monkeypatch.setattr(TrajectoryBuilder, "build", forget)
    report = compare(word_model, tokenizer, texts)
    published, few, everything = report["rows"]
    assert few["dropped"] == everything["dropped"] == {"mismatch": 1} and few["num_equal"] == 2
    assert few["num_tokens"] < published["num_tokens"]
    assert f"Dropped by TrajectoryBuilder of {len(texts)} prompts: 1 mismatch." in format_collection(report)


def test_figures_that_nobody_knows_are_dashes(word_model, tokenizer, texts, monkeypatch):
    monkeypatch.setattr(benchmark, "_PROCESS", Path("/none"))
    report = compare(word_model, tokenizer, texts[:1])
    assert [row["peak_memory"] for row in report["rows"]] == [None, None]
    assert format_collection(report).splitlines()[2].endswith(" - |")


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([], {}, "at least one prompt, each with at least one token, got none"),
        (["Mia", ""], {}, "got an empty one"),
        (["Mia"], {"rounds": 0}, "`rounds` must be at least 1, got 0"),
        (["Mia"], {"num_published": 0}, "`num_published` must be at least 1, got 0"),
        (["Mia"], {"response_lengths": [8, 256]}, "A prompt of 1 tokens and a response of 256 .* model's 256 pos"),
    ],
)
def test_comparisons_that_are_refused(word_model, tokenizer, monkeypatch, texts, options, message):
    monkeypatch.setattr(collection, "measure_collection", None)  # nothing long has begun
    with pytest.raises(ValueError, match=message):
        compare(word_model, tokenizer, texts, **options)


def test_models_that_cannot_be_packed_are_refused_first(word_model, tokenizer, monkeypatch):
    monkeypatch.setattr(collection, "measure_collection", None)
    word_model.config.layer_types = ["linear_attention"] * 3
    with pytest.raises(ValueError, match="Packed forward passes need a decoder with full or sliding attention"):
        compare(word_model, tokenizer, ["Mia"])


# The command


def test_numbers_are_the_words_of_random_prompts():
    tokenizer = make_number_tokenizer(3000)
    ids = shapes.random_prompts(3000, 1, 20, seed=0)[0] + [0, 2999]
    text = " ".join(map(str, ids))
    assert tokenizer(text)["input_ids"] == ids and tokenizer.decode(ids) == text
    assert len(tokenizer) == 3000 and tokenizer.eos_token_id is None


def test_collect_of_a_shape(tiny_shape, tmp_path, capsys):
    arguments = ["collect", "--shape", "4m", "--num-prompts", "4", "--num-published", "2"]
    arguments += ["--prompt-length", "6", "--max-new-tokens", "8", "--block-size", "4", "--rounds", "1"]
    files = ["--json", str(tmp_path / "new" / "out.json"), "--markdown", str(tmp_path / "out.md")]
    assert main([*arguments, "--block-sizes", "2", "4", "--max-tokens-per-batch", "40", *files]) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "new" / "out.json").read_text())
    assert format_collection(report) + "\n" == printed
    assert (tmp_path / "out.md").read_text() == f"    {report['command']}\n\n{printed}"
    assert report["kind"] == "collect" and report["name"] == "4m" and report["schema_version"] == 1
    assert report["settings"]["max_tokens_per_batch"] == 40 and report["prompt_lengths"] == [6] * 4
    assert [row["num_tokens"] for row in report["rows"]] == [16, 16, 32]
    assert [row["num_equal"] for row in report["rows"]] == [2, 2, 2]
    assert "Larger blocks, published procedure on 1" in printed and "Longer responses" not in printed


def test_collect_of_a_model(tmp_path, tokenizer, texts, capsys):
    folder, file = tmp_path / "model", tmp_path / "prompts.txt"
    model = make_word_model(tokenizer)
    set_jacobi_defaults(model, 8)  # as a CLLM has them
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    file.write_text("\n".join(texts))
    arguments = ["--model", str(folder), "--prompts", str(file), "--max-new-tokens", "11", "--rounds", "1"]
    assert main(["collect", *arguments, "--num-published", "3"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("3/3") == 3 and "Prompts of 1 to" in printed
    assert main(["collect", *arguments, "--response-lengths", "400"]) == 1
    assert "`--response-lengths`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Exactly one of `--model` and `--shape` .* got neither"),
        (["--shape", "4m", "--model", "m"], "got both"),
        (["--model", "m"], "`--model` without `--prompts`"),
        (["--model", "m", "--prompts", "missing.txt"], "`--prompts` must be a file .* 'missing.txt'"),
        (["--shape", "4m", "--prompts", "p"], "A shape has random prompts .* Drop them, or pass `--model`"),
        (["--shape", "4m", "--json", "x", "--markdown", "x"], "must be two files"),
        (["--shape", "4m", "--device", "tpu9"], "must be a device of this machine, got 'tpu9'"),
    ],
)
def test_errors_are_explained(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "make_random_model", None)  # nothing long has begun
    assert main(["collect", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("benchmark.py: ") and error.count("\n") == 1
    with pytest.raises(ValueError, match=message):
        raise ValueError(error)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["--block-size", "--block-sizes", "--num-published", "--rounds"])
def test_numbers_that_are_refused(option, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["collect", "--shape", "4m", option, "0"])
    assert stop.value.code == 2 and "integer of at least 1, got '0'" in capsys.readouterr().err
