"""Lines in a log, a bar in a terminal, and an estimate that leaves out what an earlier run has done."""

import pytest

from cllm_hf.evaluation import progress
from cllm_hf.evaluation.progress import Progress, format_seconds


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_lines_with_about_how_long_the_rest_takes(clock):
    said = []
    with Progress(say=said.append).stage("Timing", 8, expected=150) as stage:
        for _ in range(8):
            clock[0] += 6.0
            stage.advance()
    assert said == [
        "Timing: 8 prompts, about 2 min",
        "Timing: 2 of 8 prompts, about 36 s left",
        "Timing: 4 of 8 prompts, about 24 s left",
        "Timing: 6 of 8 prompts, about 12 s left",
        "Timing: done in 48 s",
    ]


def test_no_estimate_by_the_first_few(clock):
    """Where many run side by side, the first ones to end say little of the others."""
    said = []
    with Progress(say=said.append).stage("Judging", 100) as stage:
        for count in (3, 40, 57):
            clock[0] += 20.0
            stage.advance(count)
    assert said[1:] == [
        "Judging: 3 of 100 prompts",
        "Judging: 43 of 100 prompts, about 53 s left",
        "Judging: done in 60 s",
    ]


def test_what_an_earlier_run_has_done_says_nothing_of_the_rest(clock):
    said = []
    with Progress(say=said.append).stage("Timing", 100, "batches") as stage:
        stage.advance(90, is_kept=True)
        clock[0] += 20.0
        stage.advance(2)
        clock[0] += 1.0
        stage.advance(8)
    assert said[1:] == [
        "Timing: 92 of 100 batches, about 80 s left",
        "Timing: 90 of 100 batches are of an earlier run",
        "Timing: done in 21 s",
    ]


def test_a_bar_stands_in_for_the_lines(capsys):
    said = []
    shown = Progress(show_bar=True, say=said.append)
    with shown.stage("Timing", 2) as stage:
        stage.advance(2)
    shown.say("a result")
    assert said == ["a result"] and "Timing" in capsys.readouterr().err


def test_a_stage_of_nothing_is_silent(capsys):
    said = []
    with Progress(say=said.append).stage("Judging", 0), Progress(show_bar=True).stage("Judging", 0):
        pass
    with Progress().stage("Judging", 1) as stage:
        stage.advance()
    assert said == [] and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (99, "99 s"), (100, "2 min"), (5900, "98 min"), (6060, "1 h 41 min")]
)
def test_seconds_as_a_person_says_them(seconds, text):
    assert format_seconds(seconds) == text
