"""`examples/benchmarks/gpu.sh`: its stages one after the other, whatever becomes of each."""

import os
import re
import subprocess
import sys

import pytest
from pipelines import ROOT, SHAPE, load_example, write_gsm8k, write_spider
from tasks.model_options import read_model
from tasks.models import make_model, make_tokenizer
from tasks.options import read_options


SCRIPT = ROOT / "examples" / "benchmarks" / "gpu.sh"
STAGES = ["environment", "decode", "decode-compiled", "collect"]
STAGES += [f"{step}-{mode}" for step in ("train", "evaluate") for mode in ("cllm", "lossless")]
TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
# In place of Python: a stage of each outcome, and what the evaluation of the CLLM would leave.
STAND_IN = """#!/usr/bin/env bash
echo "$*" >>"$CALLS"
case "$*" in
*--compile*) sleep 30 ;;
*"benchmark decode"*) echo broken; exit 3 ;;
*"collect "*)
    mkdir -p "$OUT/cllm/steps" "$OUT/cllm/trajectories"
    echo "$COLLECTED" >"$OUT/cllm/steps/trajectories.json" ;;
*"evaluate "*/cllm\\ *) printf '# A\\n\\n| method |\\n|---|\\n| CLLM |\\n\\n| other |\\n' >"$OUT/cllm/report.md" ;;
esac
"""


def run_script(*arguments, **environment):
    return subprocess.run(
        ["bash", str(SCRIPT), *map(str, arguments)],
        env={**os.environ, "PYTHON": sys.executable, **{name: str(value) for name, value in environment.items()}},
        capture_output=True,
        text=True,
        timeout=600,
    )


def read_outcomes(folder):
    return re.findall(r"^## (\S+): (.*), \d+ s$", (folder / "summary.md").read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("task", ["gsm8k", "spider"])
def test_a_stage_that_fails_or_times_out_leaves_the_others_running(tmp_path, task):
    data = (write_gsm8k if task == "gsm8k" else write_spider)(tmp_path / "the data")
    python, calls, out = tmp_path / "python", tmp_path / "calls", tmp_path / "out"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    given = {"PYTHON": python, "CALLS": calls, "OUT": out, "LIMITS": "decode-compiled=0.2 train=7", "SIZE": "full"}
    run_script("a/model", data, out, COLLECTED='{"is_complete": false}', **given)
    assert not (out / "lossless" / "trajectories").exists() and calls.unlink() is None
    done = run_script("a/model", data, out, COLLECTED='{"is_complete": true}', **given)
    assert done.returncode == 1, done.stderr  # no report of the lossless adapter
    outcomes = dict.fromkeys(STAGES, "done")
    outcomes |= {"decode": "failed with status 3", "decode-compiled": "not done within 0.2 s"}
    assert read_outcomes(out) == list(outcomes.items())
    summary = (out / "summary.md").read_text()
    assert summary == f"# model on {task}, {summary.split(', ', 1)[1]}" and "```\nbroken\n```" in summary
    assert summary.endswith("## Both modes\n\n| method |\n|---|\n| CLLM |\n") and done.stdout in summary
    assert all((out / f"{name}.log").is_file() for name in STAGES)
    assert (out / "lossless" / "steps" / "trajectories.json").is_file() and (out / "lossless/trajectories").is_dir()
    steps = [line for line in calls.read_text().splitlines() if f"examples/{task}.py" in line]
    for line, stage in zip(steps, STAGES[3:], strict=True):
        step, mode = stage.split("-") if "-" in stage else (stage, "cllm")
        config = f"{task}-gpu-10min{'-lossless' * (mode == 'lossless')}.yaml"
        assert f"{task}.py {step} " in line and f"/{config} --data {data} " in line and f"/out/{mode} " in line


def test_what_is_asked_of_it_must_make_sense(tmp_path):
    data = write_gsm8k(tmp_path / "data")
    for arguments, size, message in (
        ((data, tmp_path / "out"), "full", "usage: .*gpu.sh MODEL DATA OUT"),
        (("model", tmp_path, tmp_path / "out"), "full", "DATA must hold test.jsonl"),
        (("model", data, tmp_path / "out"), "large", "SIZE must be full or tiny, got 'large'"),
    ):
        refused = run_script(*arguments, SIZE=size)
        assert refused.returncode == 2 and re.search(message, refused.stderr)
    assert not (tmp_path / "out" / "summary.md").exists()


@pytest.mark.parametrize("task", ["gsm8k", "spider"])
def test_both_modes_take_the_same_responses(task):
    changes = ["train.use_cpu=true", "train.bf16=false"]
    kind = getattr(load_example(task), {"gsm8k": "GSM8K", "spider": "Spider"}[task])
    configs = [ROOT / "examples" / "configs" / f"{task}-gpu-10min{suffix}.yaml" for suffix in ("", "-lossless")]
    cllm, lossless = (read_options(kind, path, changes) for path in configs)
    assert lossless.train["lossless"] and cllm.responses_only and lossless.responses_only
    for section in ("top", "task", "model", "sft", "collect"):
        assert cllm.dependencies[section] == lossless.dependencies[section]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["gsm8k", "spider"])
def test_all_stages_of_a_tiny_model(tmp_path, task):
    data = (write_gsm8k if task == "gsm8k" else write_spider)(tmp_path / "data")
    tokenizer = make_tokenizer(["Ann has 2 pens."], 300)
    tokenizer.chat_template = TEMPLATE
    model = make_model(read_model({**SHAPE, "max_position_embeddings": 1024}, "model"), tokenizer)
    for saved in (model, tokenizer):
        saved.save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    limits = [f"{stage}=240" for stage in STAGES] + ["decode=0.1"] * (task == "spider")
    done = run_script(tmp_path / "model", data, out, SIZE="tiny", LIMITS=" ".join(limits))
    assert done.returncode == 0, done.stdout + done.stderr
    outcomes = dict.fromkeys(STAGES, "done")
    outcomes |= {"decode": "not done within 0.1 s"} if task == "spider" else {}
    assert read_outcomes(out) == list(outcomes.items())
    assert (out / "decode.md").exists() == (task == "gsm8k")
    assert "jacobi 4, compiled" in (out / "decode-compiled.md").read_text()
    for mode in ("cllm", "lossless"):
        for name in ("trajectories", "cllm", "report.json", "report.md", "report.png"):
            assert (out / mode / name).exists(), f"{mode}/{name}"
    table = (out / "summary.md").read_text().split("## Both modes\n\n")[1].splitlines()
    names = [line.split("|")[1].strip() for line in table]
    assert names[0] == "method" and names.count("target model, generate()") == 2
    assert {"CLLM, jacobi 4", "lossless adapter, lossless 4"} <= set(names)
