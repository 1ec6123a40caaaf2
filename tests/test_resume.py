"""A run that is stopped and goes on is the same run: the same losses, and the same weights to the last bit."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from training_runs import make_dataset, make_trainer, train

from cllm_hf.training.resuming import newest_checkpoint


# 10 records: updates 1 to 3 are the first epoch, 4 to 6 the second, and so on.
RUN = {"num_records": 10, "max_steps": 7, "save_strategy": "steps", "save_steps": 1, "dropout": 0.2}
RUNS = {
    "full": {},
    "adapter": {"lora": True},
    "accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "online": {"trajectory_source": "online", "online_iterations": 2},
    "adapter-online-checkpointing": {"lora": True, "trajectory_source": "online", "gradient_checkpointing": True},
    "evaluation": {"num_evaluated": 5, "eval_strategy": "steps", "eval_steps": 2, "lr_scheduler_type": "linear"},
    "progressive": {"state_sampling": "progressive", "noise_window": 2, "block_size_schedule": [2, 4]},
    "bfloat16": {"bf16": True},
}


def assert_same(ours, theirs):
    assert len(ours["logs"]) >= 7 and ours["logs"] == theirs["logs"]
    assert ours["weights"].keys() == theirs["weights"].keys()
    for name, weight in ours["weights"].items():
        assert torch.equal(weight, theirs["weights"][name]), name


def check_resumed(folder, options, updates):
    undisturbed = train(folder / "whole", **options)
    for update in updates:
        checkpoint = folder / "whole" / f"checkpoint-{update}"
        assert_same(train(folder / "rest", resume=str(checkpoint), **options), undisturbed)


@pytest.mark.parametrize("name", ["full", "adapter-online-checkpointing"])
def test_a_resumed_run_equals_the_undisturbed_one(tmp_path, name):
    """From the middle of the second epoch."""
    check_resumed(tmp_path, {**RUN, **RUNS[name]}, (5,))


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_every_kind_of_run_goes_on_from_anywhere(tmp_path, name):
    """From the middle of the first epoch, its end, and the middle of the second."""
    check_resumed(tmp_path, {**RUN, **RUNS[name]}, (2, 3, 5))


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_newest_whole_checkpoint(tmp_path):
    options = {**RUN, "max_steps": 20}
    program = "import sys; sys.path.insert(0, sys.argv[1]); from training_runs import train; "
    program += f"train({str(tmp_path / 'killed')!r}, **{options!r})"
    tests = Path(__file__).parent
    killed = subprocess.Popen(
        [sys.executable, "-c", program, str(tests)],
        env={**os.environ, "PYTHONPATH": str(tests.parent), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(1200):
            if (tmp_path / "killed" / "checkpoint-8").exists() or killed.poll() is not None:
                break
            time.sleep(0.1)
    finally:
        killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    # Whatever was being written, and one that was certainly not written to its end.
    last = max((tmp_path / "killed").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    (last / "trainer_state.json").unlink(missing_ok=True)
    assert_same(train(tmp_path / "killed", resume=True, **options), train(tmp_path / "whole", **options))


def test_only_whole_checkpoints_are_gone_on_from(tmp_path, caplog):
    assert newest_checkpoint(tmp_path) is None and newest_checkpoint(tmp_path / "none") is None
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=1)
    with pytest.raises(ValueError, match="must hold a whole checkpoint, got none in"):
        trainer.train(resume_from_checkpoint=True)
    trainer.train()
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    for name in ("checkpoint-10", "checkpoint-x", "tmp-checkpoint-300"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text('{"global_step": 1')
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert "checkpoint-10 is not whole" in caplog.text
    with pytest.raises(ValueError, match="must be a whole checkpoint, got .*checkpoint-10'"):
        trainer.train(resume_from_checkpoint=tmp_path / "checkpoint-10")
    (tmp_path / "checkpoint-2" / "scheduler.pt").unlink()
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")
    assert "checkpoint-2 is not whole: it has no scheduler.pt. An older one is taken" in caplog.text


@pytest.mark.parametrize(
    "options",
    [{"train_sampling_strategy": "group_by_length"}, {"accelerator_config": {"use_seedable_sampler": False}}],
)
def test_an_order_that_does_not_follow_from_the_seed_is_not_gone_on_with(tmp_path, options):
    dataset = make_dataset()
    dataset = dataset.add_column("length", [len(ids) for ids in dataset["response_ids"]])
    trainer = make_trainer(tmp_path, dataset, max_steps=1, save_strategy="steps", save_steps=1, **options)
    trainer.train()
    with pytest.raises(ValueError, match="the order of the records must follow from the seed, got `train_sampling"):
        trainer.train(resume_from_checkpoint=True)
