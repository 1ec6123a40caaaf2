"""
Kills inside of `save_model`: whenever the process ends, the author's README outlives it, and the next run goes on.

A child saves a tiny model or an adapter on it, several times in a row, in a folder with a README of somebody's own. It
is killed by SIGKILL at its n-th call of the file system inside of `save_model`.
"""

import json
import os
import random
import signal
import sys
from types import SimpleNamespace

import pytest
from fuzzing import num_cases
from huggingface_hub import ModelCard, ModelCardData
from processes import in_new_process
from training_runs import make_dataset, make_tiny_model, make_trainer

from cllm_hf.training.saving import put_card_back


SHORT, LONG = 4, 20  # about two kills each
WORDS = "# Mine\n\nWords of my own, \xe4 and \U0001f642.\n"
README = f"---\nlicense: mit\n---\r\n{WORDS}"
# What the interpreter tells before it does it; other calls of the file system go by.
CALLS = (
    "open",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.mkdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.listdir",
)


class Countdown:
    """Ends this process by SIGKILL at its n-th call of the file system while it counts."""

    def __init__(self):
        self.left, self.is_counting, self.count = None, False, 0
        sys.addaudithook(self._see)

    def _see(self, event, arguments):
        if not self.is_counting or event not in CALLS:
            return
        self.count += 1
        if self.left is not None and self.count > self.left:
            os.kill(os.getpid(), signal.SIGKILL)


COUNTDOWN = Countdown()


def in_child(work):
    """Do something in a fork of this process; gives its exit status."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def make(folder, kind):
    options = {"export_custom_generate": kind == "export", "lora": kind != "full", "max_steps": 1}
    return make_trainer(folder, make_dataset(4), model=make_tiny_model(), **options)


def save(trainer, folder, left):
    """Save into a folder, as a training does at its end."""
    trainer.args.output_dir = str(folder)
    COUNTDOWN.left, COUNTDOWN.count, COUNTDOWN.is_counting = left, 0, True
    trainer.save_model()
    COUNTDOWN.is_counting = False
    (folder.parent / "calls").write_text(str(COUNTDOWN.count))


def train_and_save(folder, kind):
    trainer = make(folder, kind)
    trainer.train()
    trainer.save_model()


def assert_kept(folder):
    """The README is in its place, or where the next run takes it from."""
    there = [folder / name for name in ("README.md", ".README.md.earlier")]
    texts = [path.read_bytes().decode() for path in there if path.is_file()]
    assert any(text.endswith(WORDS) for text in texts)


def set_aside(draw, folder):
    """As version 0.1.0 did, with what PEFT had written when it was killed."""
    (folder / "README.md").rename(folder / ".README.md.earlier")
    card = str(ModelCard.from_template(ModelCardData()))
    text = draw.choice([None, "", "---\nlibrary_name: peft", card])
    if text is not None:
        (folder / "README.md").write_text(text)


def run_case(seed, path, runs, trains):
    draw = random.Random(seed)
    folder = path / "out"
    folder.mkdir()
    kind = draw.choice(["adapter", "adapter", "full", "export"])
    (folder / "README.md").write_bytes(README.encode())
    if draw.random() < 0.3:
        set_aside(draw, folder)
    for _ in range(draw.randrange(1, 4)):
        left = draw.randrange(runs[kind].calls)
        # Where an earlier save has left something, another may take fewer calls.
        assert in_child(lambda left=left: save(runs[kind].trainer, folder, left)) in (-signal.SIGKILL, 0)
        assert_kept(folder)
    last = (lambda: train_and_save(folder, kind)) if trains else lambda: save(runs[kind].trainer, folder, None)
    assert in_child(last) == 0
    assert_whole(folder, kind)


def assert_whole(folder, kind):
    """All is there, nothing is left over, and the README says what its author wrote."""
    readme = (folder / "README.md").read_bytes().decode()
    if kind == "export":
        assert readme.endswith(WORDS) and "custom_generate" in readme
        compile((folder / "custom_generate" / "generate.py").read_text(), "generate.py", "exec")
    else:
        assert readme == README
    weights = "model.safetensors" if kind == "full" else "adapter_model.safetensors"
    assert (folder / weights).stat().st_size > 0
    assert json.loads((folder / "generation_config.json").read_text())["decoding"] == "jacobi"
    assert not [name for name in os.listdir(folder) if name.startswith(".")]


def make_runs(path):
    """A trainer of each kind, and how many calls a save takes that is not killed."""
    found = {}
    for kind in ("adapter", "full", "export"):
        folder = path / kind / "out"
        folder.mkdir(parents=True)
        (folder / "README.md").write_bytes(README.encode())
        trainer = make(folder, kind)
        assert in_child(lambda trainer=trainer, folder=folder: save(trainer, folder, None)) == 0
        found[kind] = SimpleNamespace(trainer=trainer, calls=int((folder.parent / "calls").read_text()))
    return found


def check_cases(count, first, tmp_path, trains):
    runs = make_runs(tmp_path)
    for seed in range(first, first + num_cases(count)):
        path = tmp_path / str(seed)
        path.mkdir()
        try:
            run_case(seed, path, runs, trains)
        except AssertionError as error:
            error.args = (f"case {seed}: {error}",)
            raise


def check_moments(path):
    """A card that is put back is in one place, whenever the process ends."""
    for count in range(8):  # the calls of one that replaces, writes or removes
        folder = path / "moments" / str(count)
        folder.mkdir(parents=True)

        def put_back(left, folder=folder):
            COUNTDOWN.left, COUNTDOWN.count, COUNTDOWN.is_counting = left, 0, True
            put_card_back(folder)

        (folder / ".README.md.earlier").write_text(README, newline="")
        for left in (count, None):
            assert in_child(lambda left=left: put_back(left)) in (-signal.SIGKILL, 0)
        assert os.listdir(folder) == ["README.md"]
        assert (folder / "README.md").read_bytes().decode() == README


def check_moments_and_cases(path):
    check_moments(path)
    check_cases(SHORT, 0, path, False)


@pytest.mark.slow
def test_the_readme_outlives_kills(tmp_path):
    in_new_process(check_moments_and_cases, tmp_path)


@pytest.mark.slow
def test_the_readme_outlives_many_kills(tmp_path):
    in_new_process(check_cases, LONG, 1000, tmp_path, True)
