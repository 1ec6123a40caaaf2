"""The table of a target model and its CLLM: what is in it is counted right; nothing here looks at a time."""

import gc
import json
import sys

import pytest
import torch
from architectures import make_architecture
from conftest import VOCAB_SIZE, make_model, make_word_model
from peft import LoraConfig, get_peft_model
from PIL import Image

from cllm_hf import TrajectoryBuilder, measure_trajectories, set_jacobi_defaults
from cllm_hf.cli import main
from cllm_hf.demo.problems import make_problems
from cllm_hf.evaluation import convergence, model_report, reporting, sides
from cllm_hf.evaluation.benchmark import DecodingMethod, DecodingResult, benchmark_decoding, decode_all
from cllm_hf.evaluation.comparison import compare_decoding
from cllm_hf.evaluation.convergence import measure_convergence
from cllm_hf.evaluation.judgements import Judgement, wilson_interval
from cllm_hf.evaluation.model_comparison import compare_models
from cllm_hf.evaluation.model_report import format_models, plot_models
from cllm_hf.evaluation.shapes import random_prompts
from cllm_hf.training.inputs import make_lossless_config, prepare_drafter
from cllm_hf.trajectories.options import CleaningRules
from cllm_hf.trajectories.sources import read_prompts_and_answers


GREEDY = {"decoding": "autoregressive"}
OPTIONS = {"block_size": 4, "max_new_tokens": 12, "show_progress": False}


def random_ids(*lengths, vocab_size=VOCAB_SIZE):
    return [random_prompts(vocab_size, 1, length, seed=length)[0] for length in lengths]


PROMPTS, MORE = random_ids(9, 6, 7), random_ids(4, 11, 5, 8)


def is_even(response):
    return sum(response) % 2 == 0


def judge_by_sum(responses):
    return [Judgement(is_even(one), "even" if is_even(one) else "odd") for one in responses]


@pytest.fixture(scope="module", autouse=True)
def quick_collections():
    """Memory is measured after a collection, which need not go through all that is imported each time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def models():
    return make_model("llama", seed=0), make_model("llama", seed=1)


@pytest.fixture(scope="module")
def report(models):
    return compare_models(
        *models,
        PROMPTS,
        judge=judge_by_sum,
        more_prompts=MORE,
        assistant=make_model("llama", seed=0, num_hidden_layers=1),
        batch_size=3,
        **OPTIONS,
    )


# Counting


def test_the_methods_in_their_order(report):
    names = ["generate()", "prompt lookup", "assisted", "jacobi 4"]
    expected = [f"target model, {name}" for name in names] + ["CLLM, generate()", "CLLM, jacobi 4"]
    assert [row["name"] for row in report["rows"]] == expected == [raw["name"] for raw in report["methods"]]
    assert [row["model"] for row in report["rows"]] == ["target"] * 4 + ["cllm"] * 2


def test_further_block_sizes_are_rows_of_both_models(models):
    report = compare_models(*models, PROMPTS[:2], block_size=4, max_new_tokens=6, more_block_sizes=[2, "auto", 4])
    ways = [row["name"].partition(", ")[2] for row in report["rows"]]
    by_jacobi = ["jacobi 4", "jacobi 2", "jacobi auto"]
    assert ways == ["generate()", "prompt lookup", *by_jacobi, "generate()", *by_jacobi]
    assert all(row["num_equal"] == 2 for row in report["rows"])
    with pytest.raises(ValueError, match="`more_block_sizes` must be an integer of at least 1 or .auto., got 'all'"):
        compare_models(*models, PROMPTS[:2], block_size=4, max_new_tokens=6, more_block_sizes=["all"])


def test_candidates_are_rows_of_both_models(models):
    report = compare_models(*models, PROMPTS, more_block_sizes=[2], candidates=[1, 3], judge=judge_by_sum, **OPTIONS)
    by_jacobi = [f"jacobi {size}{more}" for size in (4, 2) for more in ("", ", 1 candidate", ", 3 candidates")]
    expected = [f"target model, {name}" for name in ["generate()", "prompt lookup", *by_jacobi]]
    expected += [f"CLLM, {name}" for name in ["generate()", *by_jacobi]]
    assert [row["name"] for row in report["rows"]] == expected
    assert [row["num_equal"] for row in report["rows"]] == [len(PROMPTS)] * len(expected)
    counts = [raw["options"]["jacobi_candidates"] for raw in report["methods"] if "jacobi" in raw["name"]]
    assert counts == [0, 1, 3] * 4
    markers = [model_report._marker(row["name"]) for row in report["rows"] if "jacobi" in row["name"]]
    assert markers == ["s", "P", "P"] * 4


def test_every_method_gives_its_own_models_text(report, models):
    for row, raw in zip(report["rows"], report["methods"]):
        model = models[row["model"] == "cllm"]
        for prompt, response in zip(PROMPTS + MORE, raw["responses"] + raw["more_responses"], strict=True):
            ids = torch.tensor([prompt])
            output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
            assert output[0, len(prompt) :].tolist() == response
        assert row["num_equal"] == len(PROMPTS)
        total = sum(map(len, raw["responses"]))
        assert row["tokens_per_forward"] == total / sum(raw["num_forwards"])
    generate, jacobi = report["rows"][0], report["rows"][3]
    assert generate["tokens_per_forward"] == 1.0 < jacobi["tokens_per_forward"]
    assert generate["speedup_over_target"] == generate["speedup_over_own"] == 1.0
    own = report["rows"][4]
    assert own["speedup_over_own"] == 1.0 and report["rows"][5]["speedup_over_own"] > 0


def test_accuracy_is_that_of_all_responses(report):
    for row, raw in zip(report["rows"], report["methods"]):
        responses = raw["responses"] + raw["more_responses"]
        right = sum(map(is_even, responses))
        accuracy = row["accuracy"]
        assert (accuracy["num_right"], accuracy["num_answers"]) == (right, len(PROMPTS + MORE))
        assert accuracy["interval"] == list(wilson_interval(right, len(responses)))
        assert sum(accuracy["kinds"].values()) == len(responses)
        assert raw["judgements"] == [[is_even(one), "even" if is_even(one) else "odd"] for one in responses]


def test_both_models_side_by_side(report):
    target, cllm = (report["methods"][number] for number in (0, 4))
    pairs = list(zip(*(raw["responses"] + raw["more_responses"] for raw in (target, cllm))))
    compared = report["comparison"]
    assert compared["num_responses"] == len(pairs) and compared["num_equal"] == sum(a == b for a, b in pairs)
    right = [(is_even(a), is_even(b)) for a, b in pairs]
    paired = compared["paired"]
    assert paired["num_only_first"] == right.count((True, False))
    assert paired["num_only_second"] == right.count((False, True))
    assert paired["num_both"] + paired["num_neither"] == sum(a == b for a, b in right)
    shares = [report["rows"][number]["accuracy"]["share"] for number in (0, 4)]
    assert paired["difference"] == pytest.approx(shares[1] - shares[0])
    assert compared["kinds"]["target"] == report["rows"][0]["accuracy"]["kinds"]


def test_parameters_and_weights(report, models):
    rows, size = report["rows"], models[0].num_parameters()
    assert [row["num_parameters"] for row in rows] == [size] * 6
    with_assistant = [row["num_assistant_parameters"] for row in rows]
    assert with_assistant[2] < size and with_assistant[:2] + with_assistant[3:] == [None] * 5
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in models[0].buffers())
    assert rows[0]["weight_bytes"] == 4 * size + buffers < rows[2]["weight_bytes"]
    if sys.platform == "linux":
        assert all(row["peak_memory"] >= 0 for row in rows)


def test_a_model_beside_itself(llama):
    calls = []

    def judge(responses):
        calls.append(responses)
        return [Judgement(True, "right")] * len(responses)

    report = compare_models(llama, llama, PROMPTS, judge=judge, more_prompts=MORE, **OPTIONS)
    assert len(calls) == 1 and len(calls[0]) == len(PROMPTS + MORE)  # the only distinct responses
    compared = report["comparison"]
    assert compared["num_equal"] == compared["num_responses"] == len(PROMPTS + MORE)
    assert compared["paired"]["p_value"] == 1.0 and compared["paired"]["difference"] == 0.0
    assert report["convergence"]["target"] == report["convergence"]["cllm"]


def test_convergence_is_that_of_the_builder(tokenizer):
    model = make_word_model(tokenizer)
    prompts = [tokenizer(problem.prompt)["input_ids"] for problem in make_problems(9, seed=4)]
    cleaning = CleaningRules(max_token_run=None, max_sentence_repeats=None, drop_empty=False)
    options = {"block_size": 5, "max_new_tokens": 23, "cleaning": cleaning, "show_progress": False}
    expected = measure_trajectories(TrajectoryBuilder(model, tokenizer, **options).build(prompts))
    responses = decode_all(DecodingMethod("", model, GREEDY), prompts, 23, show_progress=False)
    stop_ids = model.generation_config.eos_token_id
    measured = measure_convergence(model, prompts, responses, 5, tokenizer.pad_token_id, stop_ids)
    assert measured == expected and measured.num_blocks > 9
    # What is not the model's own argmax has no trajectory, and is counted.
    changed = [[(response[0] + 1) % 30 + 3, *response[1:]] for response in responses]
    assert measure_convergence(model, prompts, changed, 5, 0, stop_ids).num_left_out_blocks >= 9
    assert measure_convergence(model, prompts, [[]] * 9, 5).num_records == 0


def test_batches_keep_the_order_of_the_prompts(tokenizer):
    model, prompts = make_word_model(tokenizer), random_ids(4, 9, 6, 7, 8)
    method = DecodingMethod("generate()", model, GREEDY)
    alone = benchmark_decoding([method], prompts, 15, show_progress=False)[0].responses
    assert decode_all(method, prompts, 15, 3, tokenizer.pad_token_id, show_progress=False) == alone
    assert decode_all(method, [], 15, 3) == []


def test_compiled_methods_stand_behind_their_models_others(llama):
    methods = [
        method for side in sides.list_sides(llama, llama) for method in sides.list_methods(side, [4], None, True, ())
    ]
    ways = ["generate()", "prompt lookup", "jacobi 4", "generate(), compiled", "jacobi 4, compiled"]
    expected = [f"target model, {way}" for way in ways]
    expected += [f"CLLM, {way}" for way in ways if way != "prompt lookup"]
    assert [method.name for method in methods] == expected
    assert [method.is_compiled for method in methods] == [name.endswith("compiled") for name in expected]
    for method in methods:
        assert model_report._marker(method.name) in model_report._MARKERS.values()


def test_models_get_their_mode_back(llama):
    other = make_model("llama", seed=1).train()
    other.model.layers[0].eval()
    modes = [module.training for module in other.modules()]
    seen = []
    handle = other.register_forward_pre_hook(lambda module, args: seen.append(module.training))
    compare_models(llama, other, PROMPTS[:1], **OPTIONS)
    handle.remove()
    assert set(seen) == {False} and [module.training for module in other.modules()] == modes


# The report


def test_json_gives_the_same_text(report):
    text = format_models(report)
    assert format_models(json.loads(json.dumps(report, allow_nan=False))) == text
    header, _, *rows = text.split("\n\n")[0].splitlines()
    assert len(rows) == 6 and {line.count("|") for line in (header, *rows)} == {header.count("|")}
    assert "accuracy" in header and " + " in rows[2] and "3/3" in rows[0]
    assert "block size 4" in text and "fast-forwarded tokens a block" in text and "answers: even" in text
    assert "exact two-sided sign test" in text and "4 more" in text and "one at a time" in text


def test_without_a_judge_there_is_no_accuracy(models):
    report = compare_models(*models, PROMPTS[:1], **OPTIONS)
    assert all(row["accuracy"] is None for row in report["rows"]) and report["comparison"]["paired"] is None
    text = format_models(report)
    assert "accuracy" not in text and "sign test" not in text and "1 response " in text and "1 prompt (" in text


def test_responses_of_no_tokens_have_no_speed_to_compare_with(llama):
    method = DecodingMethod("target model, generate()", llama, GREEDY)
    silent = DecodingResult(method.name, [[], []], [0, 0], [1.0, 1.0])
    spoken = DecodingResult(method.name, [[1, 2], [3]], [2, 1], [1.0, 1.0])
    rows = []
    side = sides.list_sides(llama, llama)[0]
    for result in (silent, spoken):
        run = sides.Run(side, method, result)
        own = sides.Run(side, method, silent)
        rows.append(sides.make_row(run, own, own))
    assert [row["speedup_over_target"] for row in rows] == [None, None] == [row["speedup_over_own"] for row in rows]
    assert [row["tokens_per_forward"] for row in rows] == [None, 1.0] and rows[0]["tokens_per_second"] == 0


def test_models_that_cannot_be_packed_are_compared_all_the_same(llama):
    mamba = make_model("llama", seed=1)
    mamba.set_attn_implementation("eager")
    said = compare_models(llama, mamba, PROMPTS[:1], **OPTIONS)["notes"]
    assert any("differ in more than their weights: attention sdpa and eager" in note for note in said)
    mamba.config.layer_types = ["recurrent"] * 3  # as hybrid models say it
    result = DecodingResult("", responses=[[5] * 6] * 3)
    runs = [sides.Run(side, DecodingMethod("", side.model, GREEDY), result) for side in sides.list_sides(llama, mamba)]
    found, said = convergence.measure_sides([(run.side, run) for run in runs], PROMPTS, 4, 0)
    assert found["target"] is not None and found["cllm"] is None
    assert any("trajectories of the CLLM are not measured: Packed forward passes need" in note for note in said)


def test_candidates_that_one_model_refuses_are_noted(llama):
    report = compare_models(llama, make_architecture("bloom"), PROMPTS[:2], candidates=[2], **OPTIONS)
    ways = ["target model, generate()", "target model, prompt lookup", "target model, jacobi 4"]
    ways += ["target model, jacobi 4, 2 candidates", "CLLM, generate()", "CLLM, jacobi 4"]
    assert [row["name"] for row in report["rows"]] == ways
    assert [row["num_equal"] for row in report["rows"]] == [2] * 6
    notes = [note for note in report["notes"] if "Candidates" in note]
    assert len(notes) == 1 and notes[0].startswith("Candidates are left out for the CLLM: BloomForCausalLM does not")
    assert notes[0] in format_models(report)


def test_beyond_the_window_there_is_a_note():
    model = make_model("llama", max_position_embeddings=16)
    report = compare_models(model, make_model("llama", seed=1), PROMPTS[:1], **OPTIONS)
    expected = "A prompt of 9 tokens and a response of 12 are more than the 16 positions of the target model."
    assert report["notes"] == [expected] and report["rows"][0]["num_equal"] == 1


def test_a_cllm_that_does_not_stop_is_noted(models):
    target, cllm = make_model("llama", seed=0), models[1]
    free = compare_models(target, cllm, PROMPTS, more_prompts=MORE, **OPTIONS)
    assert free["comparison"]["num_cut_off"] == {"target": 7, "cllm": 7} and free["notes"] == []
    raw = free["methods"][0]
    target.generation_config.eos_token_id = sorted({one[2] for one in raw["responses"] + raw["more_responses"]})
    report = compare_models(target, cllm, PROMPTS, more_prompts=MORE, **OPTIONS)
    assert report["comparison"]["num_cut_off"] == {"target": 0, "cllm": 7}
    assert max(map(len, report["methods"][0]["responses"])) <= 3
    (note,) = report["notes"]
    assert "7 of 7 run on to the 12 new tokens at which they are cut off, and 0 of the target model's" in note
    assert "timed ones that end" not in note  # there are none
    text = format_models(report)
    assert note in text
    row = next(line for line in text.splitlines() if "cut off, without a stop token" in line)
    assert [cell.strip() for cell in row.strip("|").split("|")] == ["cut off, without a stop token", "0", "7"]


def test_the_note_has_the_tokens_per_forward_of_what_ends(models):
    target, cllm = make_model("llama", seed=0), make_model("llama", seed=1)
    options = {"more_prompts": MORE, "more_block_sizes": [2], **OPTIONS}
    target.generation_config.eos_token_id = list(range(VOCAB_SIZE))
    # The first prompt's response ends; no other response has that token.
    free = compare_models(target, cllm, PROMPTS, **options)["methods"]
    responses = next(raw for raw in free if raw["name"] == "CLLM, generate()")["responses"]
    stop = next(token for token in responses[0] if all(token not in other for other in responses[1:]))
    cllm.generation_config.eos_token_id = stop
    report = compare_models(target, cllm, PROMPTS, **options)
    expected = []
    for size in (4, 2):
        raw = next(raw for raw in report["methods"] if raw["name"] == f"CLLM, jacobi {size}")
        assert raw["responses"][0][-1] == stop and len(raw["responses"][0]) < 12 == len(raw["responses"][1])
        expected.append(f"{len(raw['responses'][0]) / raw['num_forwards'][0]:.2f} for CLLM, jacobi {size}")
    (note,) = report["notes"]
    assert note.endswith(f"Tokens per forward pass of the 1 of 3 timed ones that end: {', '.join(expected)}.")


@pytest.mark.parametrize(
    ("target", "cllm", "total", "is_noted"),
    [(0, 2, 7, False), (0, 3, 7, True), (10, 60, 1000, False), (10, 61, 1000, True), (61, 10, 1000, False)],
)
def test_how_many_cut_off_are_noted(target, cllm, total, is_noted):
    compared = {"num_cut_off": {"target": target, "cllm": cllm}, "num_responses": total}
    assert len(reporting.collapse_notes(compared, 12, "")) == is_noted


@pytest.mark.parametrize("has_accuracy", [True, False])
def test_the_picture(report, tmp_path, has_accuracy):
    import matplotlib

    shown = json.loads(json.dumps(report))
    if not has_accuracy:
        for row in shown["rows"]:
            row["accuracy"] = None
    pictures = []
    for size in (8, 30):
        with matplotlib.rc_context({"font.size": size}):  # somebody else's plots
            plot_models(shown, tmp_path / "new" / "models.png")
        pictures.append((tmp_path / "new" / "models.png").read_bytes())
    assert pictures[0] == pictures[1]
    with Image.open(tmp_path / "new" / "models.png") as image:
        found = {"#{:02X}{:02X}{:02X}".format(*color) for _, color in image.convert("RGB").getcolors(1 << 24)}
    assert set(model_report._COLORS.values()) <= found


# What is refused


def test_a_judge_that_leaves_answers_out(models):
    with pytest.raises(ValueError, match="one judgement for each of the 1 responses that it gets, got 0"):
        compare_models(*models, PROMPTS[:1], judge=lambda responses: [], **OPTIONS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": []}, "`prompts` must hold at least one prompt, got none"),
        ({"prompts": [[3], []]}, r"at least one token, got none in `prompts\[1\]`"),
        ({"more_prompts": [[]]}, r"got none in `more_prompts\[0\]`"),
        ({"more_prompts": [[4, VOCAB_SIZE]]}, r"got 4 to 60 in `more_prompts\[0\]`"),
        ({"block_size": 0}, "`block_size` must be an integer of at least 1, got 0"),
        ({"block_size": "auto"}, "`block_size` must be an integer of at least 1, got 'auto'"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be at least 1, got 0"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"repeats": 0}, "`repeats` must be at least 1, got 0"),
        ({"candidates": [2, -1]}, "`jacobi_candidates` must be an integer of at least 0, got -1"),
        ({"cllm": "larger"}, "must have the same vocabulary, got 60 and 64 tokens"),
        ({"assistant": "larger"}, "tokenizer of the target model, of 60 tokens, got one of 64 tokens"),
        ({"assistant": "target"}, "must be a model of its own"),
        ({"cllm": "adapter"}, "must not share their weights"),
    ],
)
def test_what_is_refused(llama, changes, message):
    special = {"larger": lambda: make_model("llama", vocab_size=64)}
    special["target"] = lambda: llama
    special["adapter"] = lambda: get_peft_model(llama, LoraConfig(target_modules="all-linear"))
    changes = {
        name: special[value]() if isinstance(value, str) and value in special else value
        for name, value in changes.items()
    }
    arguments = {"target": llama, "cllm": llama, "prompts": PROMPTS, **OPTIONS, **changes}
    with pytest.raises(ValueError, match=message):
        compare_models(**arguments)


def test_ctrl_c_goes_through(models):
    def judge(responses):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare_models(*models, PROMPTS[:1], judge=judge, **OPTIONS)


# The command


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    paths = {}
    for seed, name in enumerate(("target", "cllm")):
        paths[name] = tmp_path_factory.mktemp("models") / name
        model = make_word_model(tokenizer)
        with torch.no_grad():
            model.lm_head.weight.mul_(1 + seed)
        set_jacobi_defaults(model, 8)  # as a CLLM has them
        model.save_pretrained(paths[name])
        tokenizer.save_pretrained(paths[name])
    return paths


def test_the_command(folders, tokenizer, tmp_path, capsys):
    problems = make_problems(5, seed=7)
    file = tmp_path / "prompts.jsonl"
    model = make_word_model(tokenizer)
    prompts = [tokenizer(problem.prompt)["input_ids"] for problem in problems]
    responses = decode_all(DecodingMethod("", model, GREEDY), prompts, 10, show_progress=False)
    answers = [tokenizer.decode(response, skip_special_tokens=True) for response in responses]
    answers[3] = "something else"
    lines = [{"question": problem.prompt, "answer": f" {text}\n"} for problem, text in zip(problems, answers)]
    file.write_text("\n".join(map(json.dumps, lines)))
    arguments = ["benchmark", "models", "--target", str(folders["target"]), "--model", str(folders["cllm"])]
    arguments += ["--prompts", str(file), "--num-prompts", "3", "--num-more-prompts", "9", "--block-size", "4"]
    arguments += ["--max-new-tokens", "10", "--assistant", str(folders["target"]), "--candidates", "2"]
    outputs = {name: tmp_path / f"models.{name}" for name in ("json", "markdown", "plot")}
    arguments += [text for name, path in outputs.items() for text in (f"--{name}", str(path))]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    report = json.loads(outputs["json"].read_text())
    assert format_models(report) + "\n" == printed
    assert outputs["markdown"].read_text() == f"    {report['command']}\n\n{printed}"
    assert report["settings"]["num_prompts"] == 3 and report["settings"]["num_more_prompts"] == 2
    assert [row["num_equal"] for row in report["rows"]] == [3] * 8
    assert sum(row["name"].endswith("jacobi 4, 2 candidates") for row in report["rows"]) == 2
    assert report["rows"][0]["accuracy"]["kinds"] == {"equal": 4, "different": 1}
    assert report["models"]["cllm"]["name"] == str(folders["cllm"]) and str(folders["cllm"]) in printed
    with Image.open(outputs["plot"]) as image:
        assert image.format == "PNG"


def test_errors_of_the_command(folders, byte_tokenizer, tmp_path, capsys):
    file, other = tmp_path / "prompts.txt", tmp_path / "other"
    file.write_text("Mia has 7 apples .\n")
    make_model("llama", vocab_size=len(byte_tokenizer)).save_pretrained(other)
    byte_tokenizer.save_pretrained(other)
    start = ["benchmark", "models", "--prompts", str(file), "--target", str(folders["target"])]
    capsys.readouterr()
    for arguments, message in (
        (["--model", str(tmp_path / "none")], "`--model` must be a folder"),
        (["--model", str(other)], "`--model` must have the tokenizer of `--target`"),
        (["--model", str(folders["cllm"]), "--assistant", str(other)], "`--assistant` must have the tokenizer"),
        (["--model", str(other), "--plot", "x", "--json", "x"], "`--json` and `--plot` must be two files"),
    ):
        assert main([*start, *arguments]) == 1
        error = capsys.readouterr().err
        assert error.startswith("cllm: ") and error.count("\n") == 1 and message in error


def test_answers_of_a_prompt_file(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a", "answer": "b", "response": "c"}\n{"prompt": "d", "answer": "e"}\n')
    assert read_prompts_and_answers(file) == (["a", "d"], ["b", "e"])
    assert read_prompts_and_answers(file, limit=1) == (["a"], ["b"])
    file.write_text('{"prompt": "a", "response": "c"}\n\n{"prompt": "d"}\n')
    with pytest.raises(ValueError, match="Line 3 .* must have text in the field `response`, got none"):
        read_prompts_and_answers(file)
    assert read_prompts_and_answers(file, limit=1) == (["a"], ["c"])
    file.write_text('{"prompt": "a"}\n')
    assert read_prompts_and_answers(file) == (["a"], None)
    (tmp_path / "prompts.txt").write_text("a\n\nb\n")
    assert read_prompts_and_answers(tmp_path / "prompts.txt") == (["a", "b"], None)


# Lossless adapters


@pytest.fixture
def drafting():
    """An untrained lossless adapter with large weights, on a base model of its own."""
    torch.manual_seed(0)
    model = get_peft_model(make_model("llama", seed=0), make_lossless_config(LoraConfig(r=2)))
    prepare_drafter(model, 4, 2)
    for name, weight in model.named_parameters():
        if "lora_B" in name or "following" in name:
            torch.nn.init.normal_(weight, std=0.3)
    return model.eval()


def test_a_lossless_adapter_has_its_rows_and_its_base_models_text(models, drafting, tmp_path):
    report = compare_models(
        models[0], drafting, PROMPTS, more_block_sizes=[3, 9], judge=judge_by_sum, more_prompts=MORE, **OPTIONS
    )
    ways = ["lossless 4", "lossless 3", "lossless 5"]  # 9 is more than it drafts
    rows = [row for row in report["rows"] if row["model"] == "cllm"]
    assert [row["name"] for row in rows] == [f"lossless adapter, {way}" for way in ways]
    assert {row["num_equal"] for row in rows} == {len(PROMPTS)}
    target = report["rows"][0]
    assert all(row["accuracy"] == target["accuracy"] for row in rows)
    assert rows[0]["num_parameters"] > target["num_parameters"]
    assert [row["speedup_over_own"] for row in rows] == [row["speedup_over_target"] for row in rows]
    assert report["methods"][-1]["more_responses"] == report["methods"][0]["more_responses"]
    assert report["comparison"]["num_equal"] == len(PROMPTS + MORE) and report["convergence"]["cllm"] is None
    text = format_models(report)
    assert "Of the 9 timed responses of the lossless adapter, 9 equal the target model's, token for token" in text
    assert "drafts for the target model itself, weight for weight" in text and "| 7 responses " in text
    assert "| lossless adapter, lossless 4 " in text and "CLLM" not in text and "in more than" not in text
    plot_models(report, tmp_path / "models.png")
    assert format_models(json.loads(json.dumps(report))) == text


def test_a_lossless_adapter_on_another_base_model_has_its_own_generate(drafting):
    other = make_model("llama", seed=0)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight[0, 0] += 0.5
    report = compare_models(other, drafting, PROMPTS, more_prompts=MORE, **OPTIONS)
    names = [row["name"] for row in report["rows"] if row["model"] == "cllm"]
    assert names == ["lossless adapter, generate()", "lossless adapter, lossless 4"]
    assert [row["num_equal"] for row in report["rows"]] == [len(PROMPTS)] * 5
    assert not any("weight for weight" in note for note in report["notes"])
    assert "By generate(), both models give the same response" in format_models(report)


def test_texts_of_an_adapter_that_part_are_counted_apart(models, drafting):
    report = compare_models(models[0], drafting, PROMPTS, more_prompts=MORE, **OPTIONS)
    row = report["rows"][-1]
    row |= {"num_equal": 0, "num_near_ties": 2, "num_differing": 1, "largest_gap": 0.5, "largest_gap_in_bounds": 1.25}
    text = format_models(report)
    said = "0 equal the target model's, 2 part from it at near ties, and 1 elsewhere; the largest gap between logits"
    assert f"Of the 3 timed responses of the lossless adapter, {said} is 0.5 (1.25 of the bound)." in text
    header, _, *rows = text.split("\n\n")[0].splitlines()
    assert "| near ties | differ |" in header and "0/3" in rows[-1] and " 2 |" in rows[-1]


def test_a_lossless_adapter_alone_is_compared_with_its_base_model(drafting):
    report = compare_decoding(drafting, PROMPTS, [4, "auto"], 12, show_progress=False)
    assert [row["name"] for row in report["rows"]] == ["generate()", "prompt lookup", "lossless 4", "lossless auto"]
    assert {row["num_equal"] for row in report["rows"]} == {len(PROMPTS)}
    assert report["rows"][2]["relative_cost"] > 0
