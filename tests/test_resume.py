"""A run that is stopped and goes on is the same run: the same losses, and the same weights to the last bit."""

import pytest
import torch
from training_runs import train


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


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_equals_the_undisturbed_one(tmp_path, name):
    options = {**RUN, **RUNS[name]}
    undisturbed = train(tmp_path / "whole", **options)
    # In the middle of the first epoch, at its end, and in the middle of the second.
    for update in (2, 3, 5):
        checkpoint = tmp_path / "whole" / f"checkpoint-{update}"
        assert_same(train(tmp_path / "rest", resume=str(checkpoint), **options), undisturbed)
