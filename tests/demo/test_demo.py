"""The demo's problems are right, and all its steps work at a tiny size, as does the README on what it leaves."""

import random
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from cllm_hf import CleaningRules, CLLMTrainer, TrajectoryBuilder, load_cllm, load_trajectories
from cllm_hf.cards import format_table
from cllm_hf.cli import main
from cllm_hf.demo import run
from cllm_hf.demo.problems import LARGEST, make_problem, make_problems, make_tokenizer, read_answer
from cllm_hf.evaluation.benchmark import DecodingResult, benchmark_decoding
from cllm_hf.files import save_whole


TINY = run.DemoOptions(
    hidden_size=32,
    target_updates=5,
    target_batch_size=4,
    num_responses=8,
    num_trajectories=4,
    cllm_updates=3,
    cllm_batch_size=4,
    lossless_updates=2,
    lossless_batch_size=4,
    lossless_rank=2,
    lossless_markov_rank=2,
    lossless_block_size=4,
    num_held_out=2,
    max_new_tokens=20,
)


@pytest.mark.parametrize("largest", [LARGEST, 9])
def test_worked_answers_are_right(largest):
    """An independent reading of the question: start, then add or take away."""
    for problem in make_problems(500, 1, largest):
        numbers = [int(word) for word in problem.prompt.split() if word.isdecimal()]
        events = problem.prompt.split(" . ")[1:-1]
        total = numbers[0]
        for event, amount in zip(events, numbers[1:]):
            total += amount if re.search("buys|finds|gets|wins", event) else -amount
            assert 0 <= total <= largest and f"= {total} " in problem.response
        assert len(events) in (2, 3) and total == problem.answer == read_answer(problem.response)
        for a, sign, b, result in re.findall(r"(\d+) ([+-]) (\d+) = (\d+)", problem.response):
            assert int(result) == (int(a) + int(b) if sign == "+" else int(a) - int(b))


def test_problems_are_distinct_and_repeat_with_the_seed():
    problems = make_problems(3000, seed=2)
    assert len({problem.prompt for problem in problems}) == 3000
    assert problems == make_problems(3000, seed=2) != make_problems(3000, seed=3)


def test_every_word_is_a_token_of_its_own():
    tokenizer, rng = make_tokenizer(), random.Random(0)
    longest = 0
    for _ in range(300):
        problem = make_problem(rng)
        for text in (problem.prompt, problem.response):
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.unk_token_id not in ids and len(ids) == len(text.split())
            assert tokenizer.decode(ids) == text
        longest = max(longest, len(ids))
    assert longest < run.DemoOptions().max_new_tokens


@pytest.mark.parametrize(
    ("text", "answer"),
    [("The answer is 12 .", 12), ("The answer is", None), ("The answer is Mia", None), ("12", None), ("", None)],
)
def test_read_answer(text, answer):
    assert read_answer(text) == answer


@pytest.mark.slow
def test_all_steps_and_the_readme(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = Path("runs/demo")
    for _ in range(2):  # a second run takes the place of the first
        report = run.run_demo(TINY, folder, color=False)
        parts = ["cllm", "lossless", "responses", "target", "trajectories"]
        assert sorted(path.name for path in folder.iterdir()) == parts
        assert "states" not in load_trajectories(folder / "responses").column_names
        assert len(load_trajectories(folder / "trajectories")) == 4
    assert [result.name.split(", ")[1] for result in report.results][2:] == ["lossless", "generate()", "jacobi"]
    assert report.results[2].responses == report.results[0].responses
    assert report.accuracies[2] == report.accuracies[0]
    greedy, jacobi = report.results[3:]
    assert jacobi.responses == greedy.responses and len(greedy.responses) == 2
    assert greedy.num_forwards == [len(response) for response in greedy.responses]
    assert all(ours <= theirs for ours, theirs in zip(jacobi.num_forwards, greedy.num_forwards))
    assert report.table.count("\n") == 6 and " to converge, " in report.trajectories

    readme = (Path(__file__).parents[2] / "README.md").read_text()
    # A model that has hardly been trained repeats itself.
    monkeypatch.setattr(CleaningRules, "reason_to_drop", lambda *_: None)
    blocks = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    assert len(blocks) == 4
    shutil.copytree(folder / "target", "HuggingFaceTB/SmolLM2-135M-Instruct")  # stands in for the model on the Hub
    names = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert names["model"].generation_config.decoding == "jacobi"


def test_a_lossless_adapter_alone(tmp_path):
    report = run.run_demo(replace(TINY, mode="lossless"), tmp_path, say=lambda line: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lossless", "responses", "target", "trajectories"]
    assert [result.name.split(", ")[1] for result in report.results] == ["generate()", "jacobi", "lossless"]
    assert report.results[2].responses == report.results[0].responses and report.trajectories == ""
    model = load_cllm(tmp_path / "lossless")
    assert (model.generation_config.decoding, model.generation_config.jacobi_block_size) == ("lossless", "auto")
    assert model.active_peft_config.base_model_name_or_path == str(tmp_path / "target")
    with pytest.raises(ValueError, match="`mode` must be one of both, cllm, lossless, got 'all'"):
        replace(TINY, mode="all")


def test_ctrl_c_leaves_only_complete_parts(tmp_path, monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "DemoOptions", lambda **_: TINY)
    monkeypatch.setattr(CLLMTrainer, "train", interrupt)
    assert main(["demo", "--output-dir", str(tmp_path)]) == 130
    assert sorted(path.name for path in tmp_path.iterdir()) == ["responses", "target", "trajectories"]
    assert "interrupted" in capsys.readouterr().err

    monkeypatch.setattr(TrajectoryBuilder, "collect", interrupt)
    assert main(["demo", "--output-dir", str(tmp_path / "other")]) == 130
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["target"]


@pytest.mark.parametrize(("mode", "count"), [("both", 5), ("lossless", 4)])
def test_the_rest_of_the_time_is_told_as_it_goes(monkeypatch, mode, count):
    """On a clock by which each step takes its usual share of a hundred seconds and each optimizer step the same."""
    now = [0.0]
    monkeypatch.setattr(run.time, "perf_counter", lambda: now[0])
    said = []
    steps = run._Steps(replace(TINY, mode=mode, target_updates=100), None, said.append, None, _start=0.0)
    first = run._FirstEstimate(steps)
    shares = {name: run._SHARES[name] for name in steps._steps()}
    whole = sum(shares.values())
    for step in range(1, 101):
        now[0] = step * shares["target model"] / 100
        first.on_step_end(None, SimpleNamespace(global_step=step, max_steps=100), None)
    assert [line.strip() for line in said] == [
        "On this machine all steps take about " + run._minutes(whole - 0.2 * shares["target model"]) + " more."
    ]
    for name, share in shares.items():
        start = now[0] if steps.seconds else 0
        with steps.step(name, "Working"):
            now[0] = start + share
    titles = [line.strip() for line in said[1:]]
    assert titles[0] == f"[1/{count}] Working" and len(titles) == count
    left = whole
    for number, (title, share) in enumerate(zip(titles, shares.values()), start=1):
        assert number == 1 or title == f"[{number}/{count}] Working (about {run._minutes(left)} to go)"
        left -= share
    assert run._minutes(100) == "1.7 minutes" and run._minutes(41) == "40 seconds"


def test_output_folder_that_is_not_writable(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["demo", "--output-dir", str(tmp_path / "file")]) == 1
    assert "must be writable" in capsys.readouterr().err
    assert main(["demo", "--output-dir", "/proc/demo"]) == 1
    assert "Choose another folder" in capsys.readouterr().err


def test_a_folder_that_is_not_the_demos_is_left_alone(tmp_path, capsys):
    for name in ("target", "cllm", "lossless"):
        folder = tmp_path / f"with-{name}"
        (folder / name).mkdir(parents=True)
        (folder / name / "mine.txt").write_text("keep me")
        assert main(["demo", "--output-dir", str(folder)]) == 1
        assert "not from an earlier demo. Choose another output folder" in capsys.readouterr().err
        assert (folder / name / "mine.txt").read_text() == "keep me"


def test_a_folder_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    def fail(folder):
        write(folder, "half")
        raise RuntimeError("disk full")

    def write(folder, text):
        folder.mkdir()
        (folder / "file").write_text(text)

    target = tmp_path / "kept"
    with pytest.raises(RuntimeError, match="disk full"):
        save_whole(target, fail)
    assert list(tmp_path.iterdir()) == []
    for text in ("first", "second"):
        save_whole(target, lambda folder, text=text: write(folder, text))
        assert (target / "file").read_text() == text
    with pytest.raises(RuntimeError, match="disk full"):
        save_whole(target, fail)
    assert list(tmp_path.iterdir()) == [target] and (target / "file").read_text() == "second"

    def interrupt(self, new_name, rename=Path.rename):
        if new_name == target and "earlier" not in self.name:
            raise KeyboardInterrupt
        return rename(self, new_name)

    monkeypatch.setattr(Path, "rename", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_whole(target, lambda folder: write(folder, "third"))
    assert list(tmp_path.iterdir()) == [target] and (target / "file").read_text() == "second"


def test_command_line(capsys):
    for arguments in (["--version"], ["--help"], ["demo", "--help"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
    with pytest.raises(SystemExit) as stop:
        main(["demmo"])
    assert stop.value.code == 2 and "invalid choice" in capsys.readouterr().err


def test_medians_and_speedup():
    slow = DecodingResult("slow", [[1] * 10, [1] * 20, [1] * 30], [10, 20, 30], [1.0, 4.0, 10.0])
    fast = DecodingResult("fast", [[1] * 10, [1] * 20, [1] * 30], [5, 5, 10], [0.5, 1.0, 20.0])
    assert (slow.tokens_per_second, fast.tokens_per_second) == (5.0, 20.0)
    assert (fast.tokens_per_forward, slow.speedup_over(slow), fast.speedup_over(slow)) == (3.0, 1.0, 2.0)
    with pytest.raises(ValueError, match="at least one prompt"):
        benchmark_decoding([], [], 3)


def test_table():
    table = format_table(("method", "n"), [["a", "1"], ["long name", "10"]])
    assert table.splitlines() == [
        "| method    |  n |",
        "|-----------|---:|",
        "| a         |  1 |",
        "| long name | 10 |",
    ]
