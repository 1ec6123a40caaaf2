"""An evaluation that was interrupted goes on, mixes nothing, and tells each row when it is done."""

import copy
import gc
import json

import pytest
import torch
from conftest import VOCAB_SIZE, make_model, make_word_model

from cllm_hf import set_jacobi_defaults
from cllm_hf.cli import main
from cllm_hf.demo.problems import make_problems
from cllm_hf.evaluation import benchmark, further, model_comparison, reporting
from cllm_hf.evaluation.benchmark import DecodingMethod, benchmark_decoding, make_methods
from cllm_hf.evaluation.judgements import Judgement
from cllm_hf.evaluation.model_comparison import compare_models
from cllm_hf.evaluation.model_report import format_model_row, format_models
from cllm_hf.evaluation.shapes import random_prompts
from cllm_hf.journal import Journal


PROMPTS, MORE = ([random_prompts(VOCAB_SIZE, 1, size, size)[0] for size in sizes] for sizes in ((9, 6, 7), (4, 8, 5)))
OPTIONS = {"block_size": 4, "max_new_tokens": 10, "show_progress": False, "more_prompts": MORE}


class _Stop(Exception):
    pass


@pytest.fixture(scope="module", autouse=True)
def quick_collections():
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def models():
    return make_model("llama", seed=0), make_model("llama", seed=1)


@pytest.fixture
def computed(monkeypatch):
    """Names of the parts that are computed, and not read; at the one whose number is `stop` comes an interruption."""
    names, once = [], Journal.once

    def record(self, name, key, compute):
        def counted():
            if len(names) == record.stop:
                raise _Stop
            result = compute()
            names.append(name)
            return result

        return once(self, name, key, counted)

    record.stop, record.names = None, names
    monkeypatch.setattr(Journal, "once", record)
    return record


def judge(responses):
    return [Judgement(sum(one) % 2 == 0, "even" if sum(one) % 2 == 0 else "odd") for one in responses]


def untimed(report):
    """A report without what clocks and memory say."""
    report = json.loads(json.dumps(report))
    for row in report["rows"]:
        for name in ("tokens_per_second", "speedup_over_target", "speedup_over_own", "peak_memory"):
            del row[name]
    for raw in report["methods"]:
        del raw["seconds"], raw["peak_memory"]
    report["notes"] = [note for note in report["notes"] if "before an interruption" not in note]
    return report


@pytest.mark.parametrize("stops", [(2, 5), pytest.param(range(14), marks=pytest.mark.slow)], ids=["some", "all"])
def test_wherever_it_is_interrupted_it_goes_on(models, tmp_path, monkeypatch, computed, stops):
    monkeypatch.setattr(further, "_PROMPTS_AT_ONCE_ON_CPU", 2)
    expected = untimed(compare_models(*models, PROMPTS, judge=judge, **OPTIONS))
    parts = list(computed.names)
    assert [name.rstrip("0123456789") for name in parts] == [
        *["turn-"] * 3,
        *["responses-target-"] * 2,
        *["responses-cllm-"] * 2,
        *["memory-"] * 5,
        *["convergence-target", "convergence-cllm"],
    ]
    for stop in stops:
        folder = tmp_path / str(stop)
        del computed.names[:]
        computed.stop = stop
        with pytest.raises(_Stop):
            compare_models(*models, PROMPTS, judge=judge, keep_in=folder, **OPTIONS)
        computed.stop = None
        report = compare_models(*models, PROMPTS, judge=judge, keep_in=folder, **OPTIONS)
        assert computed.names == parts and untimed(report) == expected  # each part once
        notes = [note for note in report["notes"] if "before an interruption" in note]
        assert [note.split(",")[0] for note in notes] == ([f"{min(stop, 3)} of 3 turns"] if stop else [])


def test_parts_depend_on_models_options_and_machine(models, monkeypatch):
    target, cllm = models
    tuned, stopping = make_model("llama", seed=1), make_model("llama", seed=1)
    with torch.no_grad():
        tuned.lm_head.weight.mul_(1.001)
    stopping.generation_config.eos_token_id = 3

    def describe(cllm, max_new_tokens=10, pad_token_id=0):
        settings = {"max_new_tokens": max_new_tokens, "repeats": 2}
        return model_comparison._describe_work({"target": target, "cllm": cllm}, settings, pad_token_id)

    first = describe(cllm)
    assert first == describe(make_model("llama", seed=1)) == json.loads(json.dumps(first))
    others = [describe(tuned), describe(stopping), describe(cllm, 9), describe(cllm, pad_token_id=1), describe(target)]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    others.append(describe(cllm))
    monkeypatch.setattr(reporting, "__version__", "0.0.1")
    others.append(describe(cllm))
    assert all(one not in others[:number] for number, one in enumerate(others)) and first not in others


@pytest.mark.slow
def test_of_other_options_models_or_machines_nothing_is_taken(models, tmp_path, computed, monkeypatch):
    target, cllm = models
    compare_models(target, cllm, PROMPTS, keep_in=tmp_path, **OPTIONS)
    everything = list(computed.names)
    tuned, stopping = make_model("llama", seed=1), make_model("llama", seed=1)
    with torch.no_grad():
        tuned.lm_head.weight.mul_(1.001)
    stopping.generation_config.eos_token_id = 3
    for pair, changes in (
        ((target, tuned), {}),
        ((target, stopping), {}),
        ((target, cllm), {"max_new_tokens": 9}),
    ):
        del computed.names[:]
        compare_models(*pair, PROMPTS, keep_in=tmp_path, **{**OPTIONS, **changes})
        assert computed.names == everything
    del computed.names[:]
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    compare_models(target, stopping, PROMPTS, keep_in=tmp_path, **OPTIONS)
    assert computed.names == everything
    # Another number of prompts leaves what does not depend on it, and other methods none of the turns.
    del computed.names[:]
    compare_models(target, stopping, PROMPTS, keep_in=tmp_path, **{**OPTIONS, "more_prompts": MORE[:2]})
    assert computed.names == ["responses-target-00000", "responses-cllm-00000"]
    del computed.names[:]
    compare_models(target, stopping, PROMPTS, keep_in=tmp_path, **{**OPTIONS, "more_block_sizes": [2]})
    assert computed.names[:3] == everything[:3]


def test_a_turn_is_timed_by_all_methods_or_not_at_all(llama, tmp_path, monkeypatch):
    methods = make_methods(llama, [4])
    names = [method.name for method in methods]
    calls, run, stop = [], benchmark._run, [3 + 3 + 2]  # after warm-up and first turn, in the middle of the second

    def record(method, batch, *args):
        calls.append((method.name, len(batch[0])))
        if len(calls) == stop[0]:
            raise _Stop
        return run(method, batch, *args)

    def measure():
        del calls[:]
        return benchmark_decoding(methods, PROMPTS, 8, show_progress=False, journal=Journal(tmp_path))

    monkeypatch.setattr(benchmark, "_run", record)
    with pytest.raises(_Stop):
        measure()
    stop[0] = None
    results = measure()
    assert calls == [(name, size) for size in (9, 6, 7) for name in names]  # warm-up, second and third turn
    assert [result.num_kept_turns for result in results] == [1] * 3
    assert all(len(result.seconds) == 3 == len(result.responses) for result in results)
    again = measure()
    assert calls == [] and [result.num_kept_turns for result in again] == [3] * 3
    for result in (*results, *again):
        result.num_kept_turns = 0
    assert again == results


def test_memory_that_the_timed_runs_have_told_is_not_measured_again(models, computed, monkeypatch):
    run, peaks = benchmark._run, iter(range(1000))

    def told(*args):
        result = run(*args)
        result.extra_memory = next(peaks)
        return result

    monkeypatch.setattr(benchmark, "_run", told)
    report = compare_models(*models, PROMPTS, **OPTIONS)
    assert not any("memory" in name for name in computed.names)
    assert [row["peak_memory"] for row in report["rows"]] == [5 + 5 + 5 + number for number in range(5)]


def test_rows_are_told_when_they_are_done(models):
    told, order = [], []
    report = compare_models(
        *models,
        PROMPTS,
        judge=judge,
        say=order.append,
        on_result=lambda row: (told.append(copy.deepcopy(row)), order.append(row["name"])),
        **OPTIONS,
    )
    assert told == report["rows"]
    names = [row["name"] for row in told]
    assert [line for line in order if line in names] == names
    speeds = [line for line in order if " tokens/s" in line]
    assert [line.split(": ")[0] for line in speeds] == names
    assert order.index(speeds[-1]) < order.index(names[0])
    line = format_model_row(told[1], len(PROMPTS))
    assert line.startswith(f"{names[1]}: tokens/s ") and "equal to own generate() 3/3" in line and "accuracy" in line


# The commands


@pytest.fixture(scope="module")
def arguments(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("target", "cllm")):
        model = make_word_model(tokenizer)
        with torch.no_grad():
            model.lm_head.weight.mul_(1 + seed)
        set_jacobi_defaults(model, 8)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    lines = [json.dumps({"question": one.prompt, "answer": "?"}) for one in make_problems(5, seed=7)]
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    options = ["--num-prompts", "2", "--num-more-prompts", "3", "--block-size", "4", "--max-new-tokens", "8"]
    names = ["--target", str(folder / "target"), "--model", str(folder / "cllm")]
    return ["benchmark", "models", *names, "--prompts", str(folder / "prompts.jsonl"), *options]


def test_the_command_goes_on_and_tells_its_rows(arguments, tmp_path, capsys, computed):
    folder = tmp_path / "out"
    arguments = [*arguments, "--output-dir", str(folder), "--plot", str(tmp_path / "a.png")]
    computed.stop = 3
    with pytest.raises(_Stop):
        main(arguments)
    assert (folder / "unfinished" / "turn-00001.json").is_file() and not (folder / "report.md").exists()
    computed.stop, before = None, list(computed.names)
    capsys.readouterr()
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert len(set(computed.names)) == len(computed.names) > len(before)
    assert {path.name for path in folder.iterdir()} == {"report.json", "report.md"} and (tmp_path / "a.png").is_file()
    report = json.loads((folder / "report.json").read_text())
    assert format_models(report) + "\n" == printed.out and "2 of 2 turns" in printed.out
    told = [line for line in printed.err.splitlines() if "over own generate()" in line]
    assert told == [format_model_row(row, 2) for row in report["rows"]]
    assert "Timing 5 ways to decode, in turns: 2 of 2 prompts are of an earlier run" in printed.err


def test_ctrl_c_says_whether_the_command_goes_on(arguments, tmp_path, capsys, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmark, "_run", stop)
    assert main([*arguments, "--output-dir", str(tmp_path / "out")]) == 130
    assert "interrupted; the same command goes on where it was." in capsys.readouterr().err
    assert main(arguments) == 130
    assert "goes on" not in capsys.readouterr().err


def test_benchmark_decode_tells_its_rows(arguments, capsys):
    model, prompts = arguments[5], arguments[7]
    options = ["--num-prompts", "2", "--max-new-tokens", "6", "--block-sizes", "2", "4"]
    assert main(["benchmark", "decode", "--model", model, "--prompts", prompts, *options]) == 0
    printed = capsys.readouterr()
    told = [line.split(": ")[0] for line in printed.err.splitlines() if "speed-up over generate()" in line]
    assert told == ["generate()", "prompt lookup", "jacobi 2", "jacobi 4"]
    assert "Warming up: 4 ways to decode" in printed.err and "Warming up" not in printed.out


def test_methods_that_hold_a_model_are_kept_by_its_name(llama, tmp_path):
    assistant = make_model("llama", seed=0, num_hidden_layers=1)
    method = DecodingMethod("assisted", llama, {"decoding": "autoregressive", "assistant_model": assistant})
    for number_kept in (0, 1):
        (result,) = benchmark_decoding([method], PROMPTS[:1], 6, show_progress=False, journal=Journal(tmp_path))
        assert result.num_kept_turns == number_kept
