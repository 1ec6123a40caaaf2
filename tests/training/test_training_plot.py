"""The picture of a run: when there is one, what is in it, and that it never ends a training."""

import errno
import logging
import math
import sys
from types import SimpleNamespace

import pytest
from PIL import Image
from test_collapse import decoded
from transformers import TrainerControl, TrainerState
from watched_runs import good_responses, make_dataset, make_trainer

from cllm_hf.training import plotting, saving
from cllm_hf.training.plotting import PLOT_NAME, plot_run, read_curves
from cllm_hf.training.saving import PlotCallback


def losses(step, consistency=3.0, ar=0.5, prefix=""):
    return {f"{prefix}consistency_loss": consistency, f"{prefix}ar_loss": ar, "epoch": 1.0, "step": step}


def history(count=5, prefixes=("eval",)):
    entries = []
    for number in range(count):
        entries.append(losses(10 * number + 10, 3.0 / (number + 1)))
        for prefix in prefixes:
            entries.append({**losses(10 * number + 10, 3.1, prefix="eval_"), **decoded(0.9, prefix=prefix)})
    return entries


def colors(path):
    with Image.open(path) as image:
        return {
            "#{:02X}{:02X}{:02X}".format(*color) for _, color in image.convert("RGB").getcolors(1 << 24)
        }, image.size


def test_the_picture_shows_losses_and_decoding(tmp_path):
    assert plot_run(history(), tmp_path / "new" / "run.png")
    shown, (width, height) = colors(tmp_path / "new" / "run.png")
    assert set(plotting._COLORS[:3]) <= shown and width > 2 * height
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["run.png"]


def test_without_evaluation_there_are_losses_only(tmp_path):
    assert plot_run([losses(1), losses(2)], tmp_path / "run.png")
    shown, (width, height) = colors(tmp_path / "run.png")
    assert set(plotting._COLORS[:2]) <= shown and plotting._COLORS[2] not in shown and width < 2 * height


def test_the_same_log_gives_the_same_bytes(tmp_path):
    import matplotlib

    pictures = []
    for size in (8, 30):
        with matplotlib.rc_context({"font.size": size}):  # somebody else's plots
            plot_run(history(), tmp_path / "run.png")
        pictures.append((tmp_path / "run.png").read_bytes())
    assert pictures[0] == pictures[1]


@pytest.mark.parametrize(
    "log",
    [
        [],
        [losses(1)],
        [{"loss": 3.0, "learning_rate": 0.1, "step": step} for step in (1, 2)],
        [{"consistency_loss": 1.0}, {"consistency_loss": 1.0}],
        [losses(step, math.nan, math.inf) for step in (1, 2, 3)],
    ],
    ids=["empty", "one optimizer step", "other names", "no updates", "no numbers"],
)
def test_nothing_to_draw_gives_no_file(tmp_path, log):
    assert not plot_run(log, tmp_path / "run.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "log",
    [
        [losses(1, math.nan), losses(2), losses(3, math.inf, math.nan), losses(4)],
        [losses(0, 0.0, 0.0), losses(1, 0.0, 0.0)],
        [losses(1, 1e-9, 1e9), losses(2)],
        history(2, ("eval_a$b$c", "eval_second")),
        [decoded(repetition=math.nan) | {"step": 1}, decoded() | {"step": 2}],
        [losses(5), losses(6, 1.0), losses(5, 2.0)],
    ],
    ids=["gaps", "zeros", "far apart", "several datasets", "no losses", "twice"],
)
def test_odd_logs_are_drawn(tmp_path, log):
    assert plot_run(log, tmp_path / "run.png")
    assert len(colors(tmp_path / "run.png")[0]) > 10


def test_curves():
    curves = read_curves([losses(2, 7.0), {"step": 1, "ar_loss": 1}, losses(3, math.inf), losses(2, 5.0)])
    assert list(curves["consistency_loss"]) == [2, 3] and curves["consistency_loss"][2] == 5.0
    assert math.isnan(curves["consistency_loss"][3])
    assert list(curves["ar_loss"].items()) == [(1, 1.0), (2, 0.5), (3, 0.5)]
    assert set(curves) == {"consistency_loss", "ar_loss"}


def test_a_training_draws_after_each_evaluation_and_at_its_end(word_model, tokenizer, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(saving, "plot_run", lambda log, path: drawn.append((list(log), path)))
    dataset = make_dataset(good_responses(4))
    options = {"eval_strategy": "steps", "eval_steps": 2, "plot_run": True}
    make_trainer(word_model, dataset, tokenizer, tmp_path, dataset, **options).train()
    assert [path for _, path in drawn] == [tmp_path / PLOT_NAME] * 3
    assert plot_run(*drawn[-1])
    assert set(plotting._COLORS[:3]) <= colors(tmp_path / PLOT_NAME)[0]


def test_no_plot_if_none_is_asked_for(word_model, tokenizer, tmp_path):
    dataset = make_dataset(good_responses(4))
    make_trainer(word_model, dataset, tokenizer, tmp_path, plot_run=False).train()
    assert not (tmp_path / PLOT_NAME).exists()
    own = PlotCallback()
    trainer = make_trainer(word_model, dataset, tokenizer, tmp_path, plot_run=True, callbacks=[own])
    assert [one for one in trainer.callback_handler.callbacks if isinstance(one, PlotCallback)] == [own]


def fill_disk(monkeypatch):
    def write(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(plotting, "save_figure", write)


def lose_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)


@pytest.mark.parametrize("trouble", [fill_disk, lose_matplotlib])
def test_a_plot_that_cannot_be_written_ends_no_training(word_model, tokenizer, tmp_path, monkeypatch, caplog, trouble):
    trouble(monkeypatch)
    dataset = make_dataset(good_responses(4))
    trainer = make_trainer(
        word_model, dataset, tokenizer, tmp_path, dataset, eval_strategy="steps", eval_steps=4, plot_run=True
    )
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert trainer.state.global_step == 4
    assert caplog.text.count("The plot of the run was not written") == 1
    assert not (tmp_path / PLOT_NAME).exists()


def test_only_the_main_process_draws(tmp_path):
    args = type("Arguments", (), {"output_dir": str(tmp_path)})
    for is_main in (False, True):
        state = TrainerState(is_world_process_zero=is_main, log_history=history())
        PlotCallback().on_train_end(args, state, TrainerControl())
        assert (tmp_path / PLOT_NAME).exists() is is_main


def test_a_plot_of_an_earlier_run_goes(tmp_path):
    (tmp_path / PLOT_NAME).write_bytes(b"old")
    args = SimpleNamespace(output_dir=str(tmp_path))
    resumed, fresh = (SimpleNamespace(is_world_process_zero=True, global_step=step) for step in (3, 0))
    PlotCallback().on_train_begin(args, resumed, None)
    assert (tmp_path / PLOT_NAME).exists()
    PlotCallback().on_train_begin(args, fresh, None)
    assert not (tmp_path / PLOT_NAME).exists()
