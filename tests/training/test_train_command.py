"""`cllm train`: options from flags and YAML, refusals before the work, and training that can be interrupted."""

import dataclasses
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import make_word_model
from datasets import Dataset
from loopback_hub import LoopbackHub
from processes import TWO_PROCESSES, cllm_process
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerState
from trl import ModelConfig

from cllm_hf import CleaningRules, CLLMConfig, CLLMTrainer, TrajectoryBuilder, load_cllm, load_trajectories
from cllm_hf.blocks.drafter import find_drafter
from cllm_hf.cli import main
from cllm_hf.demo.problems import make_problems
from cllm_hf.training import command
from cllm_hf.training.callbacks import UpdateBar, UpdateLines, format_log
from cllm_hf.training.checkpoints import newest_checkpoint
from cllm_hf.training.command import TrainArguments, parse_train


BLOCK_SIZE = 5
REQUIRED = ["--trajectories", "t", "--output_dir", "o"]
SHORT = {"max_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 4, "gradient_checkpointing": False}
SHORT["on_collapse"] = "ignore"  # it has something to say about data this small


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / ".cache")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("models") / "target"
    make_word_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trajectories(model_folder):
    """A collection on disk, with a test split."""
    builder = TrajectoryBuilder(
        AutoModelForCausalLM.from_pretrained(model_folder),
        AutoTokenizer.from_pretrained(model_folder),
        block_size=BLOCK_SIZE,
        max_new_tokens=18,
        test_fraction=0.25,
        cleaning=CleaningRules(max_token_run=None, max_sentence_repeats=None, drop_empty=False),
        show_progress=False,
    )
    folder = model_folder.parent / "trajectories"
    builder.collect([problem.prompt for problem in make_problems(16, seed=5)], folder)
    return folder


@pytest.fixture
def arguments(trajectories, tmp_path):
    """Of a short training into `out`."""
    options = [f"--{name}={value}" for name, value in SHORT.items()]
    return ["train", "--trajectories", str(trajectories), "--output_dir", str(tmp_path / "out"), *options]


def error_of(capsys):
    error = capsys.readouterr().err
    assert error.startswith("cllm: ") and error.count("\n") == 1
    return error


def weights_of(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def assert_equal_weights(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=0, atol=0, msg=name)


# Options


def test_options_of_the_file_and_the_command_line(tmp_path):
    file = tmp_path / "options.yaml"
    lines = ["trajectories: t", "model: m", "output_dir: o", "learning_rate: 1e-4", "max_steps: 7", "use_peft: true"]
    lines += ["save_strategy: no", "lora_target_modules: all-linear", "lr_scheduler_kwargs: {num_cycles: 2}"]
    file.write_text("\n".join([*lines, "resume_from_checkpoint: true", "bf16: null", "ar_loss_weight: 3"]))
    data, model, training = parse_train(["--config", str(file)])
    assert (data.trajectories, data.train_split, model.model_name_or_path) == ("t", "train", "m")
    assert (model.use_peft, model.lora_target_modules) == (True, "all-linear")
    assert (training.learning_rate, training.max_steps, training.ar_loss_weight) == (1e-4, 7, 3)
    assert training.save_strategy == "no" and training.lr_scheduler_kwargs == {"num_cycles": 2}
    assert training.resume_from_checkpoint == "last"
    given = ["--max-steps", "9", "--model_name_or_path=n", "--learning_rate", "0.5", "--resume_from_checkpoint", "x"]
    data, model, training = parse_train([*given, "--config", str(file), "--lora_target_modules", "q", "v"])
    assert (data.trajectories, model.model_name_or_path, model.lora_target_modules) == ("t", "n", ["q", "v"])
    assert (training.max_steps, training.learning_rate, training.resume_from_checkpoint) == (9, 0.5, "x")


@pytest.mark.parametrize(
    ("value", "expected"), [("True", "last"), ("last", "last"), ("false", None), ("checkpoint-3", "checkpoint-3")]
)
def test_where_to_resume(value, expected):
    assert parse_train([*REQUIRED, "--resume_from_checkpoint", value]).training.resume_from_checkpoint == expected


def test_bfloat16_is_for_devices_that_compute_in_it(monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    training = parse_train(REQUIRED).training
    assert training.use_cpu and not training.bf16 and training.mixed_precision == "no"
    assert parse_train([*REQUIRED, "--bf16", "true"]).training.bf16
    assert not CLLMConfig("o", use_cpu=True).bf16
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("cllm_hf.training.config.is_torch_bf16_gpu_available", lambda: True)
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    training = parse_train(REQUIRED).training
    assert training.bf16 and not training.use_cpu
    assert not parse_train([*REQUIRED, "--use_cpu"]).training.bf16
    assert not parse_train([*REQUIRED, "--fp16", "--bf16", "false"]).training.bf16


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and text.startswith("usage: cllm train --trajectories") and "--config FILE" in text
    for kind in (TrainArguments, ModelConfig, CLLMConfig):
        for field in dataclasses.fields(kind):
            assert not field.init or f"--{field.name}" in text
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "    train " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--trajectories", "t"], "required: --output_dir/--output-dir"),
        (["--output_dir", "o"], "required: --trajectories"),
        (["--trajectories", "t", "--output_dir", ""], "required: --output_dir/--output-dir"),
        ([*REQUIRED, "--dtype", "half"], "invalid choice: 'half'"),
        ([*REQUIRED, "--max_steps", "many"], "invalid int value: 'many'"),
        ([*REQUIRED, "--config"], "argument --config: expected one"),
    ],
)
def test_options_that_argparse_refuses(capsys, given, message):
    with pytest.raises(SystemExit) as stop:
        main(["train", *given])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and len(error.splitlines()) < 4


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([*REQUIRED, "--learning_rat", "3"], "`cllm train` has no such options, got --learning_rat 3"),
        ([*REQUIRED, "--mod", "m"], "no such options, got --mod m"),
        ([*REQUIRED, "more"], "no such options, got more"),
        ([*REQUIRED, "--packing"], "`packing=True`"),
        ([*REQUIRED, "--block_size", "0"], "`block_size`"),
        ([*REQUIRED, "--model", "./none"], "`--model`.*./none"),
        ([*REQUIRED, "--lora_r", "4"], "`lora_r`.*`use_peft`"),
        ([*REQUIRED, "--use_dora"], "`use_dora`.*`use_peft`"),
        ([*REQUIRED, "--bnb_4bit_quant_type", "fp4"], "`bnb_4bit_quant_type`.*`load_in_4bit`"),
        ([*REQUIRED, "--use_peft", "--lora_task_type", "SEQ_CLS"], "`lora_task_type`"),
        ([*REQUIRED, "--use_peft", "--load_in_8bit"], "`load_in_8bit`.*`bitsandbytes`"),
        ([*REQUIRED, "--do_predict"], "`do_predict`"),
        ([*REQUIRED, "--report_to", "nowhere"], "`report_to`.*nowhere"),
        ([*REQUIRED, "--max_steps", "0"], "`max_steps`.* got 0"),
        ([*REQUIRED, "--metric_for_best_model", "accuracy"], "`metric_for_best_model`.*'accuracy'.*agreement"),
        ([*REQUIRED, "--metric_for_best_model", "draft_accuracy"], "'draft_accuracy'.*ar_loss"),
        ([*REQUIRED, "--lossless", "--metric_for_best_model", "eval_agreement"], "'eval_agreement'.*draft_accuracy"),
        ([*REQUIRED, "--num_monitored_prompts", "0", "--metric_for_best_model", "agreement"], "'agreement'"),
        ([*REQUIRED, "--deepspeed", "none.json"], "package that this needs cannot be imported.*deepspeed"),
        (
            [*REQUIRED, "--resume_from_checkpoint", "last"],
            "`output_dir`",
        ),
        ([*REQUIRED, "--resume_from_checkpoint", "c"], "`resume_from_checkpoint`.*'c'"),
        (["--config", "missing.yaml"], "`--config` must be a file that can be read, got 'missing.yaml'"),
        (REQUIRED, "`path` must be a folder, or the id of a dataset on the Hub, got 't'"),
    ],
)
def test_options_that_are_refused_before_anything_happens(tmp_path, monkeypatch, capsys, given, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "load_tokenizer", None)  # nothing long has begun
    assert main(["train", *given]) == 1
    assert re.search(message, error_of(capsys))
    assert not set(tmp_path.iterdir()) - {tmp_path / ".cache"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 3", "got --learning_rat 3.* their names have underscores"),
        ("max_steps: 1.5", "`max_steps` must be of type int, got 1.5"),
        ("max_steps: null", "`max_steps` must be of type int, got None"),
        ("learning_rate: true", "`learning_rate` must be of type float, got True"),
        ("run_name: 7", "`run_name` must be of type str, got 7"),
        ("dtype: half", "`dtype` must be 'auto' or 'bfloat16' or 'float16' or 'float32', got 'half'"),
        ("eval_strategy: often", "`eval_strategy` must be 'no' or 'steps' or 'epoch', got 'often'"),
        ("lora_target_modules: [1]", r"`lora_target_modules` must be of type list.*, got \[1\]"),
        ("model: m\nmodel_name_or_path: n", "`model` and `model_name_or_path` are the same, got both"),
        ("3: 4", "must be YAML with options by name, got 'x.yaml'"),
        ("packing: true", "`packing=True`"),
    ],
)
def test_files_that_are_refused(tmp_path, monkeypatch, capsys, text, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.yaml").write_text(text)
    assert main(["train", *REQUIRED, "--config", "x.yaml"]) == 1
    assert re.search(message, error_of(capsys))


def test_quantized_weights_take_an_adapter(monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr(command, "is_bitsandbytes_available", lambda: True)
    options = parse_train([*REQUIRED, "--load_in_4bit", "--bf16", "false"])
    with pytest.raises(ValueError, match="`load_in_4bit`.*`use_peft` or `lossless`"):
        command.run_train(options)


# Training


def test_the_command_trains_a_lossless_adapter(arguments, model_folder, tmp_path, capsys):
    given = ["--lossless", "--block_size=4", "--markov_rank=2", "--drafts_per_response=3"]
    assert main([*arguments, *given]) == 0
    output = capsys.readouterr()
    assert "\ndrafting_loss: " in output.out and "consistency" not in output.out + output.err
    loaded = load_cllm(tmp_path / "out")
    drafter = find_drafter(loaded.get_base_model())
    assert (drafter.num_masks, drafter.markov_rank) == (3, 2)
    assert (loaded.active_peft_config.r, loaded.generation_config.decoding) == (64, "lossless")
    base = loaded.get_base_model().state_dict()
    for name, weight in weights_of(model_folder).items():
        assert any(
            torch.equal(weight, base[one])
            for one in (name, name.replace(".weight", ".base_layer.weight"))
            if one in base
        )


def test_the_command_trains_what_the_trainer_trains(arguments, trajectories, model_folder, tmp_path, capsys):
    assert main([*arguments, "--save_steps=1"]) == 0
    output = capsys.readouterr()
    training = CLLMConfig(output_dir=str(tmp_path / "by-hand"), bf16=False, use_cpu=True, save_strategy="no", **SHORT)
    trainer = CLLMTrainer(
        str(model_folder),
        args=training,
        train_dataset=load_trajectories(trajectories),
        processing_class=AutoTokenizer.from_pretrained(model_folder),
    )
    trainer.train()
    trained = weights_of(tmp_path / "out")
    assert_equal_weights(trained, trainer.model.state_dict())
    assert any((weight != trained[name]).any() for name, weight in weights_of(model_folder).items())
    model = load_cllm(tmp_path / "out")
    assert (model.generation_config.decoding, model.generation_config.jacobi_block_size) == ("jacobi", BLOCK_SIZE)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("Mia has")["input_ids"]

    # All that is said.
    lines = output.err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["step 1 of 2", "step 2 of 2"] and "ar_loss" in lines[0]
    losses = [log["consistency_loss"] for log in trainer.state.log_history if "consistency_loss" in log]
    assert output.out.startswith("Trained for 2 optimizer steps.\n")
    assert f"consistency_loss: {losses[0]:.4g} -> {losses[1]:.4g}\n" in output.out
    assert f"Written: {tmp_path / 'out'}\n" in output.out
    assert f"`cllm benchmark decode --model {tmp_path / 'out'} --prompts FILE`" in output.out


def test_a_file_of_options_trains_an_adapter(arguments, model_folder, tmp_path, capsys):
    before = weights_of(model_folder)
    file = tmp_path / "train.yaml"
    lines = [f"model: {model_folder}", "use_peft: true", "lora_r: 4", "lora_target_modules: all-linear"]
    file.write_text("\n".join([*lines, "learning_rate: 1e-2", "max_steps: 50", "save_strategy: no", "dtype: auto"]))
    assert main([*arguments, "--config", str(file)]) == 0
    assert capsys.readouterr().out.startswith("Trained for 2 optimizer steps.\n")  # the command line wins
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 4
    assert not list((tmp_path / "out").glob("checkpoint-*"))
    model = load_cllm(tmp_path / "out")
    assert model.generation_config.decoding == "jacobi"
    assert any(parameter.any() for name, parameter in model.named_parameters() if "lora_B" in name)
    assert_equal_weights(before, weights_of(model_folder))


def test_evaluation_is_on_the_test_split(arguments, trajectories, tmp_path, capsys):
    options = [*arguments, "--save_strategy=no"]
    assert main([*options, "--do_eval"]) == 0  # at the end
    output = capsys.readouterr()
    assert output.out.count("eval_loss: ") == 1 and output.err.count("eval_loss ") == 1
    assert main([*options, "--eval_strategy=steps", "--eval_steps=1"]) == 0
    output = capsys.readouterr()
    assert " -> " in output.out.split("eval_loss: ")[1].splitlines()[0] and output.err.count("eval_loss ") == 2
    assert main([*options, "--do_eval", "--eval_split=train[:3]"]) == 0
    other = capsys.readouterr().out
    assert other.split("eval_loss: ")[1].split()[0] != output.out.split("eval_loss: ")[1].split()[2]

    load_trajectories(trajectories).save_to_disk(str(tmp_path / "train-only"))
    options[2] = str(tmp_path / "train-only")
    capsys.readouterr()
    assert main([*options, "--do_eval"]) == 1
    assert "Evaluation takes a split `test`, which" in error_of(capsys)
    assert main([*options, "--do_eval", "--eval_split=dev"]) == 1
    assert "'dev'" in error_of(capsys)


@pytest.mark.parametrize("way", ["missing", "columns", "empty", "block size", "unfinished"])
def test_datasets_that_are_refused(arguments, trajectories, tmp_path, monkeypatch, capsys, way):
    monkeypatch.setattr(CLLMTrainer, "train", None)
    folder = tmp_path / "data"
    message = {"missing": "which is not there|must be a folder", "columns": "prompt_ids", "empty": "manifest.json"}
    message |= {"block size": f"{BLOCK_SIZE}", "unfinished": "unfinished collection"}
    options = [*arguments, "--block_size=7"] if way == "block size" else arguments
    if way == "columns":
        Dataset.from_dict({"text": ["a"]}).save_to_disk(str(folder))
    elif way == "empty":
        folder.mkdir()
    elif way != "missing":
        shutil.copytree(trajectories, folder)
    if way == "unfinished":
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps({**manifest, "complete": False}))
    options[2] = str(folder)
    capsys.readouterr()
    assert main(options) == 1
    assert re.search(message[way], error_of(capsys))


def test_the_folder_of_a_dataset_is_no_place_for_a_model(arguments, trajectories, tmp_path, monkeypatch, capsys):
    shutil.copytree(trajectories, tmp_path / "out")
    assert main(arguments) == 1
    assert "must not hold a dataset" in error_of(capsys)
    assert not (tmp_path / "out" / "config.json").exists()


def test_columns_of_other_names_are_explained(arguments, tmp_path, capsys):
    file = tmp_path / "texts.jsonl"
    file.write_text('{"question": "a", "answer": "b"}\n')
    arguments[2] = str(file)
    assert main([*arguments, "--lossless"]) == 1
    assert "have columns `prompt` and `response`" in error_of(capsys)


def test_an_output_folder_that_cannot_be_written_is_found_before_the_model_is_loaded(
    arguments, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(command, "load_tokenizer", None)
    (tmp_path / "out").write_text("")
    assert main(arguments) == 1
    assert "output folder must be writable" in error_of(capsys)


def test_the_model_is_that_of_the_dataset_or_is_named(arguments, trajectories, tmp_path, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(trajectories, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    arguments[2] = str(folder)
    manifest["model"]["name"] = "/moved/away"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert main(arguments) == 1
    assert "was made by the model /moved/away, which is not there. Pass it as `--model`" in error_of(capsys)
    del manifest["model"]["name"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert main(arguments) == 1
    assert "does not say which model it was made by. Pass it as `--model`" in error_of(capsys)


def test_another_model_than_that_of_the_dataset_is_warned_of(arguments, model_folder, tokenizer, tmp_path, capsys):
    def train(folder):
        code = main([*arguments, "--model", str(folder), "--save_strategy=no", "--max_steps=1"])
        return code, capsys.readouterr().err

    shutil.copytree(model_folder, tmp_path / "same")
    shutil.copytree(model_folder, tmp_path / "other")
    make_word_model(tokenizer, "gpt2").save_pretrained(tmp_path / "other")
    code, error = train(tmp_path / "same")
    assert code == 0 and "cllm: " not in error
    code, error = train(tmp_path / "other")
    assert code == 0 and f"cllm: The trajectories were made by {model_folder}, and" in error
    shutil.rmtree(tmp_path / "other")
    shutil.copytree(model_folder, tmp_path / "other")
    model = make_word_model(tokenizer)
    model.resize_token_embeddings(20)
    model.save_pretrained(tmp_path / "other")
    code, error = train(tmp_path / "other")
    assert code == 1 and "must be in the model's vocabulary of 20, got " in error


def test_a_full_memory_is_explained(arguments, monkeypatch, capsys):
    def fill(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

    monkeypatch.setattr(CLLMTrainer, "train", fill)
    assert main(arguments) == 1
    assert "memory of the device is full (CUDA out of memory. Tried to allocate 2 GiB.). Lower" in error_of(capsys)


# Publishing


def test_a_trained_model_is_pushed(arguments, tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(command, "check_can_push", lambda repo_id, token, **options: calls.append(repo_id))
    monkeypatch.setattr(CLLMTrainer, "init_hf_repo", lambda self, **options: setattr(self, "hub_model_id", "user/out"))
    monkeypatch.setattr(CLLMTrainer, "push_to_hub", lambda self, **options: calls.append(options))
    options = [*arguments, "--save_strategy=no", "--push_to_hub"]
    assert main([*options, "--hub_model_id=user/cllm"]) == 0
    assert calls == ["user/cllm", {"dataset_name": None}]  # a folder of this machine is nobody else's business
    assert capsys.readouterr().out.endswith("Published: user/out\n")

    def fail(self, **options):
        self.save_model(_internal_call=True)
        raise ConnectionError("no network")

    monkeypatch.setattr(CLLMTrainer, "push_to_hub", fail)
    assert main(options) == 1
    assert f"The model is complete in {tmp_path / 'out'}, but was not published: no network" in capsys.readouterr().err
    assert calls[2] == "out"

    def refuse(*args, **kwargs):
        raise PermissionError("no token")

    monkeypatch.setattr(command, "check_can_push", refuse)
    monkeypatch.setattr(command, "load_records", None)  # it is asked before the work
    assert main(options) == 1
    assert error_of(capsys) == "cllm: no token\n"


@pytest.mark.slow
def test_from_the_hub_to_the_hub(arguments, trajectories, model_folder, tmp_path):
    with LoopbackHub() as hub:
        environment = {**os.environ, **hub.environment(tmp_path / "home", token="hf_write")}
        environment |= {"HF_HUB_OFFLINE": "0", "PYTHONWARNINGS": "ignore"}

        def run(*options):
            launched = [sys.executable, "-m", "cllm_hf", *options]
            done = subprocess.run(launched, env=environment, capture_output=True, text=True, timeout=240)
            assert done.returncode == 0, done.stderr
            return done.stdout

        run("push", str(trajectories), "user/trajectories")
        arguments[2] = "user/trajectories"
        # What is published does not tell the folder of the target model.
        options = [f"--model={model_folder}", "--push_to_hub", "--hub_model_id=user/cllm", "--save_strategy=no"]
        output = run(*arguments, *options)
        assert output.endswith("Published: user/cllm\n")
        code = "from cllm_hf import load_cllm; print(load_cllm('user/cllm').generation_config.jacobi_block_size)"
        loaded = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert loaded.stdout.strip() == str(BLOCK_SIZE), loaded.stderr


# Interrupting and resuming


def test_an_interrupted_training_goes_on(arguments, tmp_path, monkeypatch, capsys):
    options = [*arguments, "--max_steps=4", "--save_steps=2"]
    assert main([*options, "--output_dir", str(tmp_path / "undisturbed")]) == 0
    capsys.readouterr()
    log = UpdateLines.on_log

    def interrupt(self, args, state, control, logs=None, **kwargs):
        if state.global_step == interrupted_at:
            raise KeyboardInterrupt
        log(self, args, state, control, logs)

    monkeypatch.setattr(UpdateLines, "on_log", interrupt)
    interrupted_at = 1
    assert main(options) == 130
    assert "interrupted before there was a checkpoint (see `--save-steps`)" in capsys.readouterr().err
    interrupted_at = 3
    assert main(options) == 130
    newest = tmp_path / "out" / "checkpoint-2"
    error = capsys.readouterr().err
    assert f"the same command with `--resume-from-checkpoint last` goes on at {newest}" in error
    assert not (tmp_path / "out" / "config.json").exists()
    interrupted_at = None
    assert main([*options, "--resume_from_checkpoint", "last"]) == 0
    output = capsys.readouterr()
    assert [line.split(":")[0] for line in output.err.splitlines()] == ["step 3 of 4", "step 4 of 4"]
    assert_equal_weights(weights_of(tmp_path / "undisturbed"), weights_of(tmp_path / "out"))
    state = TrainerState.load_from_json(str(tmp_path / "out" / "checkpoint-4" / "trainer_state.json"))
    assert [log["step"] for log in state.log_history if "loss" in log] == [1, 2, 3, 4]
    assert output.out.startswith("Trained for 4 optimizer steps.\n")
    assert main([*arguments, "--model", "./none"]) == 1
    newest = tmp_path / "out" / "checkpoint-4"
    assert f"cllm: {newest} is of an earlier run, and this one begins anew" in capsys.readouterr().err


@pytest.mark.slow
def test_ctrl_c_in_a_real_process(arguments, tmp_path):
    options = [*arguments, "--max_steps=100000", "--save_steps=5", "--save_total_limit=1"]
    with cllm_process(options, stdout=subprocess.PIPE) as process:
        deadline = time.monotonic() + 240
        while newest_checkpoint(tmp_path / "out") is None and time.monotonic() < deadline:
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        output, error = process.communicate(timeout=120)
    assert process.returncode == 130 and not output and "Traceback" not in error
    newest = newest_checkpoint(tmp_path / "out")
    updates = TrainerState.load_from_json(f"{newest}/trainer_state.json").global_step
    assert error.rstrip().endswith(f"`--resume-from-checkpoint last` goes on at {newest}.")
    options += [f"--max_steps={updates + 2}", "--resume_from_checkpoint=last"]
    run = subprocess.run([sys.executable, "-m", "cllm_hf", *options], capture_output=True, text=True, timeout=240)
    assert run.returncode == 0 and run.stdout.startswith(f"Trained for {updates + 2} optimizer steps."), run.stderr


@pytest.mark.slow
def test_torchrun_trains_and_one_process_speaks(arguments, tmp_path):
    launcher = [*TWO_PROCESSES, "-m", "cllm_hf"]
    run = subprocess.run([*launcher, *arguments], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("Trained for 2 optimizer steps.") == 1 and run.stderr.count("step 2 of 2") == 1
    assert load_cllm(tmp_path / "out").generation_config.decoding == "jacobi"


# What is shown


def test_a_line_of_a_log():
    logs = {"loss": 1.23456, "ar_tokens": 7, "epoch": 0.1, "eval_runtime": 3.0, "eval_samples_per_second": 2.0}
    assert format_log(3, 10, logs) == "step 3 of 10: loss 1.235, ar_tokens 7"


def test_a_bar_for_a_terminal(capsys):
    state = TrainerState(max_steps=4, global_step=2)
    bar = UpdateBar("ar_loss")
    bar.on_train_begin(None, state, None)
    state.global_step = 3
    bar.on_step_end(None, state, None)
    bar.on_log(None, state, None, logs={"ar_loss": 0.5, "loss": 0.25})
    bar.on_prediction_step(None, state, None)
    bar.on_evaluate(None, state, None, metrics={"eval_loss": 0.75})
    bar.bar.refresh()
    bar.on_train_end(None, state, None)
    shown = capsys.readouterr().err
    assert "3/4" in shown and "ar_loss=0.500" in shown and "0.25" not in shown and "Evaluating" in shown
    assert "step 3 of 4: eval_loss 0.75\n" in shown
    bar.on_prediction_step(None, state, None)  # an evaluation after the training
    bar.on_evaluate(None, state, None, metrics={"eval_loss": 0.75})


def test_notices_of_this_package_are_shown_once(capsys):
    from cllm_hf.process import show_notices

    logger = logging.getLogger("cllm_hf.training.anything")
    with show_notices():
        logger.warning("first of %s", "two")
        logger.info("nothing")
    with show_notices(False):
        logger.warning("second of two")
    assert capsys.readouterr().err == "cllm: first of two\n"
    assert not logging.getLogger("cllm_hf").handlers
