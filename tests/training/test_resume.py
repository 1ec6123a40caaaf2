"""A run that is stopped and goes on is the same run: the same losses, and the same weights to the last bit."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from training_runs import DEFAULTS, make_dataset, make_trainer, train

from cllm_hf import CLLMConfig
from cllm_hf.training.checkpoints import choose_checkpoint, describe_run, find_flaw, newest_checkpoint


# 10 records: optimizer steps 1 to 3 are the first epoch, 4 to 6 the second, and so on.
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
@pytest.mark.parametrize("options", [{}, {"lora": True}, {"trajectory_source": "online"}], ids=str)
def test_a_run_that_is_done_stays_as_it_is(tmp_path, options):
    """Its last checkpoint is in the middle of an epoch, of which transformers would train another step."""
    options = {**RUN, "max_steps": 5, **options}
    done = train(tmp_path, **options)
    again = train(tmp_path, resume=True, **options)
    assert again["logs"] == done["logs"] and not (tmp_path / "checkpoint-6").exists()
    assert all(torch.equal(again["weights"][name], weight) for name, weight in done["weights"].items())


def test_a_killed_run_goes_on_from_its_newest_whole_checkpoint(tmp_path):
    options = {**RUN, "max_steps": 20}
    program = "import sys; sys.path.insert(0, sys.argv[1]); from training_runs import train; "
    program += f"train({str(tmp_path / 'killed')!r}, **{options!r})"
    tests = Path(__file__).parents[1]
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
    with pytest.raises(ValueError, match="`output_dir`"):
        trainer.train(resume_from_checkpoint=True)
    trainer.train()
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    for name in ("checkpoint-10", "checkpoint-x", "tmp-checkpoint-300"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text('{"global_step": 1')
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert "checkpoint-10 is not whole" in caplog.text
    with pytest.raises(ValueError, match="`resume_from_checkpoint`.*checkpoint-10"):
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
    with pytest.raises(ValueError, match="`train_sampling_strategy="):
        trainer.train(resume_from_checkpoint=True)


SAVING = {"save_strategy": "steps", "save_steps": 1}


@pytest.fixture(scope="module", params=[False, True], ids=["full", "adapter"])
def run(request, tmp_path_factory):
    """A folder with two checkpoints, and whether they are of an adapter."""
    folder = tmp_path_factory.mktemp("run")
    make_trainer(folder, lora=request.param, **SAVING).train()
    return folder, request.param


def can_be_missing(name):
    """Whether a run that goes on has a file of a checkpoint itself."""
    return name in ("training_args.bin", "config.json", "generation_config.json", "adapter_config.json") or (
        "tokenizer" in name
    )


def test_a_checkpoint_without_a_file_or_with_a_cut_one_is_passed_over(run, tmp_path, caplog):
    """Each file in turn, cut at its beginning, its middle and its end, or gone."""
    folder, _ = run
    shutil.copytree(folder, tmp_path / "out")
    last = tmp_path / "out" / "checkpoint-2"
    names = sorted(path.name for path in last.iterdir() if path.suffix not in (".md", ".jinja"))
    assert find_flaw(last) is None and {"optimizer.pt", "scheduler.pt", "rng_state.pth"} <= set(names)
    for name in names:
        sound = (last / name).read_bytes()
        end = len(sound.rstrip()) - 1 if name.endswith(".json") else len(sound) - 1
        for length in (0, 1, len(sound) // 2, end, None):
            (last / name).unlink()
            if length is not None:
                (last / name).write_bytes(sound[:length])
            elif can_be_missing(name):
                continue
            caplog.clear()
            assert newest_checkpoint(tmp_path / "out") == str(tmp_path / "out" / "checkpoint-1"), (name, length)
            assert "checkpoint-2 is not whole: it ha" in caplog.text
            assert name in caplog.text or (length is None and "has no weights" in caplog.text)
        (last / name).write_bytes(sound)
    assert newest_checkpoint(tmp_path / "out") == str(last)


def test_an_explicit_checkpoint_that_is_not_whole_is_refused(run, tmp_path):
    folder, lora = run
    shutil.copytree(folder / "checkpoint-1", tmp_path / "checkpoint-1")
    trainer, path = make_trainer(tmp_path, lora=lora), tmp_path / "checkpoint-1" / "optimizer.pt"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="`resume_from_checkpoint`.* cut, optimizer"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    path.unlink()
    with pytest.raises(ValueError, match="`resume_from_checkpoint`.* no optimizer.pt"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_shards_of_weights_that_are_missing_cut_or_outside_are_noticed(tmp_path):
    make_trainer(tmp_path, max_steps=1, **SAVING).train()
    checkpoint = tmp_path / "checkpoint-1"
    sound = (checkpoint / "model.safetensors").read_bytes()
    (checkpoint / "model.safetensors").rename(checkpoint / "model-00001-of-00001.safetensors")
    index = checkpoint / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}}))
    assert find_flaw(checkpoint) is None
    (checkpoint / "model-00001-of-00001.safetensors").write_bytes(sound[:-1])
    assert "cut, model-00001" in find_flaw(checkpoint)
    (checkpoint / "model-00001-of-00001.safetensors").unlink()
    assert "cut, model.safetensors.index.json" in find_flaw(checkpoint)
    index.write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    assert "must be that of a file inside it" in find_flaw(checkpoint)
    index.write_text(json.dumps({"weight_map": [1]}))
    assert "cut, model.safetensors.index.json" in find_flaw(checkpoint)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset": make_dataset(seed=3)}, "other records in the dataset"),
        ({"dataset": make_dataset(9)}, "`num_records` is 10 there and 9 here"),
        ({"seed": 7}, "`seed` is 42 there and 7 here"),
        ({"data_seed": 7}, "`data_seed` is 42 there and 7 here"),
        ({"per_device_train_batch_size": 2}, "`per_device_train_batch_size` is 4 there and 2 here"),
        ({"gradient_accumulation_steps": 2}, "`gradient_accumulation_steps` is 1 there and 2 here"),
        # The same records in each optimizer step.
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}, None),
        ({"data_seed": 42}, None),
        ({"learning_rate": 1e-3, "max_steps": 3}, None),
        ({"dataset": make_dataset().with_format("torch")}, None),
        ({"dataset": make_dataset().select(range(10)[::-1]).select(range(10)[::-1])}, None),
    ],
)
def test_another_dataset_seed_or_batch_size_is_refused_by_name(run, change, message):
    folder, _ = run
    options = {**DEFAULTS, **{name: value for name, value in change.items() if name != "dataset"}}
    args = CLLMConfig(output_dir=str(folder), **options)
    record = describe_run(args, change.get("dataset", make_dataset()))
    for wanted in (True, folder / "checkpoint-1"):
        if message is None:
            assert choose_checkpoint(wanted, args, record) is not None
            continue
        with pytest.raises(ValueError, match=message):
            choose_checkpoint(wanted, args, record)


def test_a_trainer_refuses_the_checkpoint_of_another_run(run, tmp_path):
    folder, lora = run
    shutil.copytree(folder / "checkpoint-1", tmp_path / "checkpoint-1")
    trainer = make_trainer(tmp_path, make_dataset(seed=3), lora=lora)
    with pytest.raises(ValueError, match="other records in the dataset"):
        trainer.train(resume_from_checkpoint=True)


def test_a_checkpoint_of_an_earlier_version_is_gone_on_from(run, tmp_path, caplog):
    """It does not say what it is of, and the checkpoints after it do."""
    folder, lora = run
    shutil.copytree(folder / "checkpoint-1", tmp_path / "checkpoint-1")
    path = tmp_path / "checkpoint-1" / "trainer_state.json"
    state = json.loads(path.read_text())
    assert state["stateful_callbacks"].pop("RunRecordCallback")["args"]["record"]["seed"] == 42
    path.write_text(json.dumps(state))
    make_trainer(tmp_path, lora=lora, seed=7, **SAVING).train(resume_from_checkpoint=True)
    assert "does not say which dataset, seed and size of batches it was trained with" in caplog.text
    with pytest.raises(ValueError, match="`seed` is 7 there and 42 here"):
        make_trainer(tmp_path, lora=lora, max_steps=3).train(resume_from_checkpoint=True)


def test_checkpoints_of_the_model_only_are_named_as_such(tmp_path, caplog):
    trainer = make_trainer(tmp_path, save_only_model=True, **SAVING)
    trainer.train()
    assert "holds no state of the optimizer" in find_flaw(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match="`output_dir`"):
        trainer.train(resume_from_checkpoint=True)
    assert "checkpoint-2 is not whole: it holds no state of the optimizer" in caplog.text
    with pytest.raises(ValueError, match="`save_only_model=True`"):
        trainer.train(resume_from_checkpoint=tmp_path / "checkpoint-2")
