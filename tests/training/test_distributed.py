"""Two processes train what one with their batches together trains; one process never touches torch.distributed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader
from training_runs import train
from transformers import AutoModelForCausalLM

from cllm_hf import CLLMConfig
from cllm_hf.training.batch import count_own_rows
from cllm_hf.training.inputs import check_processes


TESTS = Path(__file__).parents[1]
# 10 records in batches of 2 on 2 processes: the last batch of an epoch, step 3, has 2 records for 4 places, so that
# the second process has only repeated ones.
RUN = {"num_records": 10, "per_device_train_batch_size": 2, "max_steps": 5, "optim": "sgd", "learning_rate": 0.1}
EVALUATION = {"num_evaluated": 7, "per_device_eval_batch_size": 2, "eval_strategy": "steps", "eval_steps": 2}
RUNS = {
    "adapter": {"lora": True, "gradient_checkpointing": True},
}
SLOW_RUNS = {
    "full": {**EVALUATION},
    "online": {"trajectory_source": "online", "online_iterations": 2, "gradient_accumulation_steps": 2},
    "accumulation": {"gradient_accumulation_steps": 2, "num_records": 13},
    "checkpointing": {"gradient_checkpointing": True, "context": "noisy", "noise_window": 2},
    "adapter-online": {"lora": True, "trajectory_source": "online", "states_per_block": 2},
    # A LoRA of alpha 128 takes larger steps than all weights.
    "lossless": {"lossless": True, "learning_rate": 0.03, "gradient_accumulation_steps": 2, "num_records": 13},
    "lossless-checkpointing": {
        "lossless": True,
        "learning_rate": 0.03,
        "gradient_checkpointing": True,
        **EVALUATION,
    },
    "few-records": {"num_records": 3, "num_evaluated": 1, "eval_strategy": "steps", "eval_steps": 2},
    "local": {"consistency": "local", "divergence": "jensen_shannon", "num_records": 11},
}
SHARDED_RUNS = {
    "sharded": {**EVALUATION},
    "sharded-online": {"trajectory_source": "online", "online_iterations": 2, "gradient_accumulation_steps": 2},
    "sharded-checkpointing": {"gradient_checkpointing": True},
}


def run_processes(folder: Path, runs: dict[str, dict], num_processes: int = 2) -> dict[str, list[dict]]:
    """Train runs in several processes; for each run what every process ended with."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "runs.json").write_text(json.dumps(runs))
    finished = subprocess.run(
        [sys.executable, str(TESTS / "training_runs.py"), str(folder), str(num_processes)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS.parent)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    return {name: [torch.load(folder / f"{name}-{rank}.pt") for rank in range(num_processes)] for name in runs}


def train_alone(folder: Path, options: dict) -> dict:
    """One process with the batches of two."""
    return train(folder, **{**options, **{name: 2 * options[name] for name in options if name.startswith("per_dev")}})


def assert_equal_logs(ours: list[dict], theirs: list[dict], run: str) -> None:
    assert len(ours) == len(theirs) >= 5, run
    for log, other in zip(ours, theirs):
        assert log == pytest.approx(other, rel=1e-4), run


def assert_two_equal_one(folder: Path, runs: dict[str, dict]) -> None:
    runs = {name: {**RUN, **options} for name, options in runs.items()}
    for name, results in run_processes(folder, runs).items():
        alone = train_alone(folder / "alone" / name, runs[name])
        for result in results:
            assert_equal_logs(result["logs"], alone["logs"], name)
            for weight, theirs in zip(result["weights"].values(), alone["weights"].values()):
                torch.testing.assert_close(weight, theirs, atol=1e-5, rtol=1e-4, msg=name)
        for weight, other in zip(*(result["weights"].values() for result in results)):
            assert torch.equal(weight, other), name


def test_two_processes_equal_one_with_their_batches_together(tmp_path):
    assert_two_equal_one(tmp_path, RUNS)


@pytest.mark.slow
def test_more_runs_in_two_processes_equal_one(tmp_path):
    assert_two_equal_one(tmp_path, SLOW_RUNS)


@pytest.mark.slow
def test_a_model_in_parts_is_trained_and_saved_as_a_whole_one(tmp_path):
    """FSDP2, by which the host shards a model when it is loaded; its option `fsdp` is for GPUs only."""
    runs = {name: {**RUN, **options} for name, options in SHARDED_RUNS.items()}
    sharded = {name: {**options, "sharded": True} for name, options in runs.items()}
    for name, results in run_processes(tmp_path, sharded).items():
        alone = train_alone(tmp_path / "alone" / name, runs[name])
        assert_equal_logs(results[0]["logs"], alone["logs"], name)
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / name / "saved")
        assert saved.generation_config.decoding == "jacobi"
        for weight, theirs in zip(saved.state_dict().values(), alone["weights"].values()):
            torch.testing.assert_close(weight, theirs, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.slow
def test_two_processes_go_on_as_if_they_had_not_stopped(tmp_path):
    """In the second epoch, whose order of records is another than that of the first."""
    options = {**RUN, "dropout": 0.2, "lora": True, "optim": "adamw_torch"}
    runs = {
        "whole": {**options, "save_strategy": "steps", "save_steps": 1},
        "rest": {**options, "resume": str(tmp_path / "whole" / "checkpoint-4")},
    }
    results = run_processes(tmp_path, runs)
    for whole, rest in zip(results["whole"], results["rest"]):
        assert whole["logs"] == rest["logs"] and len(whole["logs"]) == 5
        for name, weight in whole["weights"].items():
            assert torch.equal(weight, rest["weights"][name]), name


@pytest.mark.slow
def test_one_process_never_uses_torch_distributed(tmp_path):
    options = {**RUN, **EVALUATION, "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
    run_processes(tmp_path, {"alone": {**options, "trajectory_source": "online"}}, num_processes=1)


def test_options_that_would_let_a_process_wait_for_ever_are_refused(tmp_path):
    accelerator = SimpleNamespace(num_processes=2, parallelism_config=None)
    for option, message in (
        ("even_batches", "`even_batches=False`"),
        ("dispatch_batches", "`dispatch_batches=True`"),
    ):
        config = CLLMConfig(str(tmp_path), bf16=False, accelerator_config={option: option == "dispatch_batches"})
        with pytest.raises(ValueError, match=message):
            check_processes(config, accelerator)
        check_processes(config, SimpleNamespace(num_processes=1))
    check_processes(CLLMConfig(str(tmp_path), bf16=False), accelerator)
    accelerator.parallelism_config = SimpleNamespace(tp_size=2, cp_size=1)
    with pytest.raises(ValueError, match="tp_size=2"):
        check_processes(CLLMConfig(str(tmp_path), bf16=False), accelerator)


def test_all_rows_count_where_nothing_is_repeated():
    class Stream:
        def __len__(self):  # as the host's shard of a stream has it
            raise TypeError

    def count(dataset, drop_last):
        loader = SimpleNamespace(dataset=dataset)
        state = SimpleNamespace(end_of_dataloader=True, active_dataloader=loader)
        accelerator = SimpleNamespace(num_processes=2, process_index=0, gradient_state=state)
        return count_own_rows(2, accelerator, drop_last)

    assert count(range(5), False) == 1
    assert count(range(5), True) == 2
    assert count(Stream(), False) == 2


@pytest.mark.parametrize("num_records", [1, 3, 6, 8, 13])
def test_every_record_of_an_epoch_counts_once(num_records):
    """Batches of 2 on 3 processes, shared out by the host."""
    seen = []
    for rank in range(3):
        loader = prepare_data_loader(
            DataLoader(range(num_records), batch_size=2), num_processes=3, process_index=rank, put_on_device=False
        )
        accelerator = SimpleNamespace(num_processes=3, process_index=rank, gradient_state=loader.gradient_state)
        for batch in loader:
            assert len(batch) > 0
            seen += batch[: count_own_rows(len(batch), accelerator)].tolist()
    assert sorted(seen) == list(range(num_records))
