"""Two processes train what one with their batches together trains; one process never touches torch.distributed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_runs import train


TESTS = Path(__file__).parent
# 10 records in batches of 2 on 2 processes: the last batch of an epoch, update 3, has 2 records for 4 places, so that
# the second process has only repeated ones.
RUN = {"num_records": 10, "per_device_train_batch_size": 2, "max_steps": 5, "optim": "sgd", "learning_rate": 0.1}
EVALUATION = {"num_evaluated": 7, "per_device_eval_batch_size": 2, "eval_strategy": "steps", "eval_steps": 2}
RUNS = {
    "full": {**EVALUATION},
    "adapter": {"lora": True, "gradient_checkpointing": True},
    "online": {"trajectory_source": "online", "online_iterations": 2, "gradient_accumulation_steps": 2},
}
SLOW_RUNS = {
    "accumulation": {"gradient_accumulation_steps": 2, "num_records": 13},
    "checkpointing": {"gradient_checkpointing": True, "context": "noisy", "noise_window": 2},
    "adapter-online": {"lora": True, "trajectory_source": "online", "states_per_block": 2},
    "few-records": {"num_records": 3, "num_evaluated": 1, "eval_strategy": "steps", "eval_steps": 2},
    "local": {"consistency": "local", "divergence": "jensen_shannon", "num_records": 11},
}


def run_processes(folder: Path, runs: dict[str, dict], num_processes: int = 2) -> dict[str, list[dict]]:
    """Train runs in several processes; for each run what every process ended with."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "runs.json").write_text(json.dumps(runs))
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS.parent)}
    finished = subprocess.run(
        [sys.executable, *command, str(TESTS / "training_runs.py"), str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    return {name: [torch.load(folder / f"{name}-{rank}.pt") for rank in range(num_processes)] for name in runs}


def assert_two_equal_one(folder: Path, runs: dict[str, dict]) -> None:
    runs = {name: {**RUN, **options} for name, options in runs.items()}
    for name, results in run_processes(folder, runs).items():
        options = runs[name]
        sizes = {size: 2 * options[size] for size in options if size.startswith("per_device")}
        alone = train(folder / "alone" / name, **{**options, **sizes})
        assert len(alone["logs"]) >= 5
        for result in results:
            assert len(result["logs"]) == len(alone["logs"]), name
            for ours, theirs in zip(result["logs"], alone["logs"]):
                assert ours == pytest.approx(theirs, rel=1e-4), name
            for weight, theirs in zip(result["weights"].values(), alone["weights"].values()):
                torch.testing.assert_close(weight, theirs, atol=1e-5, rtol=1e-4, msg=name)
        for weight, other in zip(*(result["weights"].values() for result in results)):
            assert torch.equal(weight, other), name


def test_two_processes_equal_one_with_their_batches_together(tmp_path):
    assert_two_equal_one(tmp_path, RUNS)


@pytest.mark.slow
def test_more_runs_in_two_processes_equal_one(tmp_path):
    assert_two_equal_one(tmp_path, SLOW_RUNS)
