"""What the benchmarks count is right, and what they cannot do they say; nothing here looks at a time."""

import json
from collections import Counter

import pytest
import torch
import transformers
from architectures import make_architecture
from conftest import VOCAB_SIZE, make_model, make_word_model
from peft import LoraConfig, get_peft_model

from cllm_hf._host import CACHE_NAME
from cllm_hf.cli import main
from cllm_hf.evaluation import command, comparison, reporting, shapes
from cllm_hf.evaluation.arguments import SHAPE_NAMES
from cllm_hf.evaluation.benchmark import DecodingMethod, DecodingResult, benchmark_decoding, make_methods
from cllm_hf.evaluation.comparison import BareForward, compare_widths, relative_cost
from cllm_hf.evaluation.model_comparison import compare_models
from cllm_hf.files import check_writable_file, write_whole
from cllm_hf.trajectories.responding import split_batches
from cllm_hf.trajectories.sources import read_prompts, read_prompts_and_answers


GREEDY = {"decoding": "autoregressive"}


def random_ids(*lengths):
    return [shapes.random_prompts(VOCAB_SIZE, 1, length, seed=length)[0] for length in lengths]


# Counting


@pytest.mark.parametrize("batch_size", [1, 3])
def test_tokens_and_forwards_are_those_of_the_statistics(llama, batch_size):
    rows = random_ids(9, 7, 12, 5)
    methods = [
        DecodingMethod("generate()", llama, GREEDY),
        DecodingMethod("jacobi", llama, {"jacobi_block_size": 6}),
        DecodingMethod("counted otherwise", llama, {"jacobi_block_size": 6}, is_compiled=True),
    ]
    results = benchmark_decoding(methods, rows, 20, show_progress=False, batch_size=batch_size, repeats=2)
    num_batches = len(split_batches(rows, batch_size))
    for result in results:
        assert [len(response) for response in result.responses] == [20] * len(rows)
        assert len(result.num_forwards) == num_batches and len(result.seconds) == 2 * num_batches
        assert result.num_equal_to(results[0]) == len(rows) and result.peak_memory is None
    greedy, jacobi, unhooked = results
    assert greedy.num_forwards == [20] * num_batches and greedy.tokens_per_forward == 1.0
    assert greedy.widths == Counter({1: 19 * num_batches})
    assert jacobi.num_forwards == unhooked.num_forwards and unhooked.widths == Counter()
    assert sum(jacobi.widths.values()) == sum(jacobi.num_forwards) - num_batches and max(jacobi.widths) == 6
    if batch_size == 1:
        for row, num_forwards in zip(rows, jacobi.num_forwards):
            ids = torch.tensor([row])
            options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 20}
            output = llama.generate(ids, jacobi_block_size=6, return_dict_in_generate=True, **options)
            assert output.jacobi_stats.num_forwards == num_forwards
        assert jacobi.tokens_per_forward == 20 * len(rows) / sum(jacobi.num_forwards) > 1


def test_responses_of_a_batch_are_those_of_single_prompts(tokenizer):
    model = make_word_model(tokenizer)
    rows = random_ids(4, 9, 6, 7, 8)
    methods = [
        DecodingMethod("generate()", model, GREEDY),
        DecodingMethod("jacobi", model, {"jacobi_block_size": 4}),
        DecodingMethod("generate() unhooked", model, GREEDY, is_compiled=True),
    ]
    alone = benchmark_decoding(methods, rows, 15, show_progress=False)
    together = benchmark_decoding(methods, rows, 15, False, batch_size=3, pad_token_id=tokenizer.pad_token_id)
    assert len({len(response) for response in alone[0].responses}) > 1
    for single, batch in zip(alone, together):
        assert single.responses == batch.responses == alone[0].responses
    assert alone[0].num_forwards == alone[2].num_forwards and together[0].num_forwards == together[2].num_forwards
    assert together[0].tokens_per_forward < 1.0  # ended rows wait for the last one


def test_methods_take_turns_on_every_batch(llama, monkeypatch):
    calls = []

    def record(self, ids, **kwargs):
        calls.append((kwargs["jacobi_block_size"], ids.shape[1]))
        return ids

    monkeypatch.setattr(type(llama), "generate", record)
    methods = [DecodingMethod(str(size), llama, {"jacobi_block_size": size}, size == 3) for size in (2, 3)]
    benchmark_decoding(methods, random_ids(5, 6, 7), 4, show_progress=False, repeats=2)
    # A compiled method has met every shape before the clocks start, the longest first.
    assert calls == [(2, 5), (3, 7), (3, 6), (3, 5)] + 2 * [(size, length) for length in (5, 6, 7) for size in (2, 3)]


def test_rates_of_batches_and_rounds():
    slow = DecodingResult("slow", [[1] * 10, [1] * 20, [1] * 30], [20, 30], [3.0, 3.0, 6.0, 6.0], batch_size=2)
    fast = DecodingResult("fast", [[1] * 10, [1] * 20, [2] * 30], [10, 15], [1.0, 1.0, 2.0, 2.0], batch_size=2)
    assert slow.tokens_per_second == 7.5 and fast.speedup_over(slow) == 3.0
    assert slow.tokens_per_forward == 60 / (2 * 20 + 30) and fast.num_equal_to(slow) == 2


@pytest.mark.parametrize("changes", [{"batch_size": 0}, {"repeats": 0}])
def test_benchmark_refuses_empty_runs(llama, changes):
    with pytest.raises(ValueError, match=f"`{next(iter(changes))}` must be at least 1, got 0"):
        benchmark_decoding([], [[1]], 3, **changes)


# Forward passes


def test_forwards_see_the_cache_lengths_asked_for():
    for name in ("llama", "gemma3"):  # the second has layers that see a window of 8
        model, seen = make_model(name), []

        def look(module, args, kwargs, seen=seen):
            seen.append((kwargs[CACHE_NAME].get_seq_length(), args[0].shape))

        handle = model.register_forward_pre_hook(look, with_kwargs=True)
        bare = BareForward(model, 4, batch_size=2)
        for length in (9, 10, 13, 13, 30):
            bare.seconds(length)
        handle.remove()
        assert [length for length, shape in seen if shape == (2, 4)] == [9, 10, 13, 13, 30]
        assert [(length, shape) for length, shape in seen if shape != (2, 4)] == [(0, (2, 9)), (17, (2, 13))]


def test_widths_are_timed_in_turns(llama):
    seen = []
    handle = llama.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    seconds = compare_widths(llama, [4, 1, 4, 2], cache_length=7, iterations=5)
    handle.remove()
    assert {width: len(values) for width, values in seconds.items()} == {1: 5, 2: 5, 4: 5}
    assert seen[:6] == [7, 1, 7, 2, 7, 4] and seen[-6:] == [1, 2, 4, 1, 2, 4]


def test_relative_cost_is_measured_or_between():
    seconds = {1: [1.0, 2.0, 1.0], 5: [2.0, 4.0, 3.0], 9: [4.0, 8.0, 4.0]}
    assert [relative_cost(seconds, width) for width in (1, 3, 5, 7, 9, 20)] == [1.0, 1.5, 2.0, 3.0, 4.0, 4.0]


def test_limit_is_the_gain_in_forwards_over_their_cost():
    model = make_model("llama")
    baseline = DecodingResult("generate()", [[1] * 12], [12], [1.0])
    result = DecodingResult("jacobi", [[1] * 12], [4], [0.5], widths=Counter({4: 2, 2: 1}))
    seconds = {1: [1.0], 2: [1.5], 4: [2.0]}
    row = comparison._row(DecodingMethod("", model, {"jacobi_block_size": 4}), result, baseline, seconds)
    assert (row["relative_cost"], row["limit"], row["speedup"]) == (2.0, 1.5, 2.0)
    row = comparison._row(DecodingMethod("", model, {"jacobi_block_size": "auto"}), result, baseline, seconds)
    assert row["limit"] == pytest.approx(3 / ((2 * 2.0 + 1.5) / 3))
    assert comparison._row(DecodingMethod("", model, GREEDY), baseline, baseline, seconds)["limit"] is None
    # A tree has more tokens than a block.
    wide = DecodingResult("candidates", [[1] * 12], [4], [0.5], widths=Counter({4: 1, 2: 1}))
    row = comparison._row(
        DecodingMethod("", model, {"jacobi_block_size": 2, "jacobi_candidates": 1}), wide, baseline, seconds
    )
    assert row["relative_cost"] == 1.75


# Shapes and prompts


@pytest.mark.parametrize(
    ("shape", "expected"),
    [("4m", 3_934_464), ("30m", 29_893_120), ("125m", 137_841_408), ("0.5b", 494_032_768)],
)
def test_shapes_have_the_parameters_promised(shape, expected):
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(shapes.shape_config(shape))
    assert model.num_parameters() == expected
    assert set(SHAPE_NAMES) == set(shapes.SHAPES)


def test_random_models_accept_no_drafts_and_do_not_end():
    model = shapes.make_random_model("4m", 0, "auto", torch.device("cpu"))
    prompt = torch.tensor(shapes.random_prompts(2048, 1, 16, 0))
    mask = torch.ones_like(prompt)
    output = model.generate(
        prompt,
        attention_mask=mask,
        jacobi_block_size=8,
        do_sample=False,
        max_new_tokens=24,
        return_dict_in_generate=True,
    )
    assert output.jacobi_stats.num_generated == [24] and output.jacobi_stats.num_forwards >= 23


def test_answers_may_be_numbers(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a", "answer": 4}\n{"prompt": "b", "answer": 1.5}\n{"prompt": "c", "answer": "x"}\n')
    assert read_prompts_and_answers(path) == (["a", "b", "c"], ["4", "1.5", "x"])
    path.write_text('{"prompt": "a", "answer": true}\n')
    assert read_prompts_and_answers(path) == (["a"], None)


def test_prompts_of_text_and_json_files(tmp_path):
    text, lines = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    text.write_text("one line\n\n  another \n")
    lines.write_text('{"question": "how?", "answer": "so"}\n{"prompt": "and\\u2028then", "question": "no"}\n')
    assert read_prompts(text) == ["one line", "another"]
    assert read_prompts(lines) == ["how?", "and\u2028then"]
    assert read_prompts(lines, limit=1) == ["how?"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b" \n\n", "must hold at least one prompt"),
        ("a.txt", b"\xff\xfe\x00", "must be a text file in UTF-8"),
        ("a.jsonl", b'{"prompt": "x"}\n\n{"prompt": \n', "Line 3 of .* must be JSON"),
        ("a.json", b'{"prompt": "x"}\nplain\n', "Line 2 of .* must be JSON"),
        ("a.jsonl", b'{"text": "x"}\n', "Line 1 .* field `prompt` or `question`"),
        ("a.jsonl", b'["x"]\n', "Line 1 .* field `prompt` or `question`"),
        ("a.jsonl", b'{"prompt": " "}\n', "Line 1 .* field `prompt` or `question`"),
    ],
)
def test_prompt_files_that_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / name)


def test_compiled_methods_are_passed_on():
    model = make_model("llama")
    methods = make_methods(model, [4, "auto"], is_compiled=True)
    assert [method.name for method in methods] == [
        "generate()",
        "prompt lookup",
        "jacobi 4",
        "jacobi auto",
        "generate(), compiled",
        "jacobi 4, compiled",  # and none that changes its shape
    ]
    expected = {"decoding": "jacobi", "jacobi_block_size": 4, "jacobi_candidates": 0, "jacobi_compile": True}
    assert methods[-1].options == expected
    assert methods[-2].options["cache_implementation"] == "static" and methods[-2].is_compiled
    assert "not compiled here" in reporting.compile_notes(methods)[0] and reporting.compile_notes(methods[:4]) == []


# Candidates


def test_candidates_stand_beside_their_plain_row(llama):
    methods = make_methods(llama, [4, "auto"], is_compiled=True, candidates=[1, 3, 0, 1])
    assert [method.name for method in methods] == [
        "generate()",
        "prompt lookup",
        "jacobi 4",
        "jacobi 4, 1 candidate",
        "jacobi 4, 3 candidates",
        "jacobi auto",
        "jacobi auto, 1 candidate",
        "jacobi auto, 3 candidates",
        "generate(), compiled",
        "jacobi 4, compiled",  # a tree changes its shape
    ]
    options = [method.options.get("jacobi_candidates") for method in methods]
    assert options == [None, None, 0, 1, 3, 0, 1, 3, None, 0]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_candidates_give_the_same_texts_and_wider_forward_passes(llama, batch_size):
    rows = random_ids(9, 7, 12)
    report = comparison.compare_decoding(llama, rows, [4], 20, batch_size, show_progress=False, candidates=[2])
    plain, tree = report["methods"][-2:]
    assert (plain["name"], tree["name"]) == ("jacobi 4", "jacobi 4, 2 candidates")
    assert tree["options"] == {**plain["options"], "jacobi_candidates": 2}
    assert [row["num_equal"] for row in report["rows"]] == [3] * len(report["rows"])
    assert max(map(int, plain["widths"])) == 4 < max(map(int, tree["widths"]))
    assert max(map(int, report["forward_seconds"])) == max(map(int, tree["widths"]))
    assert report["rows"][-1]["relative_cost"] is not None and "jacobi 4, 2 candidates" in report["rows"][-1]["name"]


def test_plain_rows_have_no_candidates_of_the_generation_config():
    model = make_model("llama")
    expected = comparison.compare_decoding(model, random_ids(9), [4], 20, show_progress=False)
    model.generation_config.jacobi_candidates = 3
    found = comparison.compare_decoding(model, random_ids(9), [4], 20, show_progress=False)
    assert [raw["widths"] for raw in found["methods"]] == [raw["widths"] for raw in expected["methods"]]


def test_bare_forward_passes_fit_the_positions_of_the_model():
    model = make_model("gpt2", n_positions=32)
    report = comparison.compare_decoding(model, random_ids(9, 7), [8], 20, 2, show_progress=False, candidates=[4])
    widest = max(map(int, report["methods"][-1]["widths"]))
    assert widest + report["cache_length"] > 32  # siblings share a position
    assert max(map(int, report["forward_seconds"])) + report["cache_length"] <= 32
    wide = comparison.compare_decoding(model, random_ids(9, 7), [16, 30], 20, 2, show_progress=False)
    assert max(map(int, wide["forward_seconds"])) + wide["cache_length"] == 32


def test_texts_longer_than_the_positions_are_refused_before_anything_is_timed():
    model, other = make_model("gpt2", n_positions=32), make_model("gpt2", n_positions=32, seed=1)
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model is run"))
    for run in (
        lambda: comparison.compare_decoding(model, random_ids(9), [8], 24, show_progress=False),
        lambda: compare_models(model, other, random_ids(9), block_size=8, max_new_tokens=24, show_progress=False),
    ):
        with pytest.raises(ValueError, match="must fit into the 32 positions of the model, got 9 and 24 tokens"):
            run()


@pytest.mark.parametrize(
    ("model_type", "reason"), [("bloom", "finds positions by itself"), ("gpt_neo", "layers of type .'local'.")]
)
def test_a_model_that_takes_no_trees_has_a_note(model_type, reason):
    model, rows = make_architecture(model_type), random_ids(9, 7)
    report = comparison.compare_decoding(model, rows, [4], 8, show_progress=False, candidates=[1, 2])
    assert [row["name"] for row in report["rows"]] == ["generate()", "prompt lookup", "jacobi 4"]
    assert [row["num_equal"] for row in report["rows"]] == [2, 2, 2]
    (note,) = report["notes"]
    assert note.startswith("Candidates are left out: ") and note in comparison.format_comparison(report)
    with pytest.raises(ValueError, match=reason):
        raise ValueError(note)


@pytest.mark.parametrize("value", [-1, 1.5, "2", True])
def test_candidates_that_are_refused(value):
    with pytest.raises(ValueError, match="`jacobi_candidates` must be an integer of at least 0, got"):
        comparison.compare_decoding(None, [[1]], [4], 8, candidates=[1, value])


# The commands


def test_decode_of_a_shape(tiny_shape, tmp_path, capsys):
    arguments = ["benchmark", "decode", "--shape", "4m", "--num-prompts", "2", "--max-new-tokens", "8"]
    arguments += ["--prompt-length", "6", "--block-sizes", "2", "4", "--repeats", "2"]
    files = ["--json", str(tmp_path / "new" / "out.json"), "--markdown", str(tmp_path / "out.md")]
    assert main([*arguments, *files]) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "new" / "out.json").read_text())
    assert comparison.format_comparison(report) + "\n" == printed
    assert (tmp_path / "out.md").read_text() == f"    {report['command']}\n\n{printed}"
    assert report["command"].startswith("cllm benchmark decode --shape 4m") and report["schema_version"] == 1
    assert report["options"]["block_sizes"] == [2, 4] and report["settings"]["num_prompts"] == 2
    assert [row["name"] for row in report["rows"]] == ["generate()", "prompt lookup", "jacobi 2", "jacobi 4"]
    assert all(row["num_equal"] == 2 for row in report["rows"])
    for raw, row in zip(report["methods"], report["rows"]):
        assert len(raw["responses"]) == len(raw["num_forwards"]) == 2 and len(raw["seconds"]) == 4
        assert sum(map(len, raw["responses"])) / sum(raw["num_forwards"]) == row["tokens_per_forward"]
    assert list(report["forward_seconds"]) == ["1", "2", "4"]
    assert report["prompt_lengths"] == [6, 6] and report["environment"]["dtype"] == "float32"
    assert printed.count("| jacobi") == 2 and "2/2" in printed


def test_decode_of_a_model_with_an_assistant(model_folder, tmp_path, capsys):
    file = tmp_path / "prompts.txt"
    file.write_text("Mia has 7 apples .\nMia buys 5 more .\nBen has 2 .\n")
    arguments = ["benchmark", "decode", "--model", str(model_folder), "--prompts", str(file)]
    arguments += ["--max-new-tokens", "10", "--block-sizes", "4"]
    files = ["--json", str(tmp_path / "a.json")]
    assert main([*arguments, "--assistant", str(model_folder), *files, "--candidates", "1", "2"]) == 0
    report = json.loads((tmp_path / "a.json").read_text())
    names = ["generate()", "prompt lookup", "assisted", "jacobi 4", "jacobi 4, 1 candidate", "jacobi 4, 2 candidates"]
    assert [row["name"] for row in report["rows"]] == names
    assert all(row["num_equal"] == 3 for row in report["rows"])
    assert report["options"]["candidates"] == [1, 2]
    assert [raw["options"]["jacobi_candidates"] for raw in report["methods"][3:]] == [0, 1, 2]
    assert report["methods"][2]["options"]["assistant_model"] == str(model_folder)
    assert report["methods"][0]["num_forwards"] == [len(response) for response in report["methods"][0]["responses"]]

    capsys.readouterr()
    assert main([*arguments, "--batch-size", "2", "--num-prompts", "2"]) == 0
    printed = capsys.readouterr().out
    assert "prompt lookup" not in printed and "Prompt lookup is left out" in printed and "2/2" in printed
    assert main([*arguments, "--batch-size", "2", "--assistant", str(model_folder)]) == 1
    assert "Drop one of the two" in capsys.readouterr().err


def test_an_adapter_is_measured(model_folder, tokenizer, tmp_path, capsys):
    adapter, file = tmp_path / "adapter", tmp_path / "prompts.txt"
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False)).save_pretrained(adapter)
    tokenizer.save_pretrained(adapter)
    file.write_text("Mia has 7 apples .\n")
    arguments = ["--model", str(adapter), "--block-sizes", "4", "--json", str(tmp_path / "a.json")]
    assert main(["benchmark", "decode", "--prompts", str(file), "--max-new-tokens", "10", *arguments]) == 0
    assert "1/1" in capsys.readouterr().out
    environment = json.loads((tmp_path / "a.json").read_text())["environment"]
    assert environment["architecture"] == "LlamaForCausalLM"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["decode"], "Exactly one of `--model` and `--shape` .* got neither"),
        (["decode", "--shape", "4m", "--model", "m"], "got both"),
        (["decode", "--model", "m"], "`--model` without `--prompts`"),
        (["decode", "--model", "m", "--prompts", "missing.txt"], "`--prompts` must be a file .* 'missing.txt'"),
        (
            ["decode", "--model", "/none", "--prompts", "p"],
            "`--model` must be a folder, .*'/none', which is not there",
        ),
        (["decode", "--model", "./none", "--prompts", "p"], "'./none', which is not there"),
        (["decode", "--shape", "4m", "--prompts", "p"], "Drop them, or pass `--model`"),
        (["decode", "--shape", "4m", "--chat"], "`--assistant` or `--chat`. Drop them, or pass `--model`"),
        (["decode", "--shape", "4m", "--json", "x", "--markdown", "x"], "must be two files"),
        (["decode", "--shape", "4m", "--json", "."], "must be a file, got the folder"),
        (["decode", "--shape", "4m", "--json", "/proc/none/x"], "must be writable"),
        (["decode", "--shape", "4m", "--device", "tpu9"], "must be a device of this machine, got 'tpu9'"),
    ],
)
def test_errors_are_explained(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "make_random_model", None)  # nothing long has begun
    assert main(["benchmark", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("cllm: ") and error.count("\n") == 1
    with pytest.raises(ValueError, match=message):
        raise ValueError(error)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["overhead", "collect", "train"])
def test_what_has_moved_says_where(kind, capsys):
    assert main(["benchmark", kind, "--shape", "4m"]) == 1
    assert f"python examples/benchmark.py {kind}" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["0", "-4", "all", "1.5", ""])
def test_block_sizes_that_are_refused(value, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["benchmark", "decode", "--shape", "4m", f"--block-sizes={value}"])
    assert stop.value.code == 2 and "integer of at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(("value", "got"), [("-1", "-1"), ("1.5", "'1.5'"), ("many", "'many'"), ("", "''")])
@pytest.mark.parametrize("kind", ["decode", "models"])
def test_numbers_of_candidates_that_are_refused(kind, value, got, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["benchmark", kind, "--model", "none", f"--candidates={value}"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and f"`jacobi_candidates` must be an integer of at least 0, got {got}." in error


def test_files_appear_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "out.json"
    check_writable_file(path)
    write_whole(path, "first")
    write_whole(path, "second")
    assert path.read_text() == "second" and list(path.parent.iterdir()) == [path]

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, "third")
    assert path.read_text() == "second" and list(path.parent.iterdir()) == [path]
