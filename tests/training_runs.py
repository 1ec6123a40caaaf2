"""
Small trainings, for tests that compare one with another; also a script that runs some of them in several processes.

    python tests/training_runs.py FOLDER NUM_PROCESSES

trains the runs of `FOLDER/runs.json` one after the other and leaves what each process ended with in FOLDER. With one
process, `torch.distributed` raises when it is used.
"""

import json
import multiprocessing
import os
import socket
import sys
from pathlib import Path

import numpy as np
import torch
from conftest import make_model
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from cllm_hf import FEATURES, CLLMConfig, CLLMTrainer
from cllm_hf.demo.problems import make_tokenizer


BLOCK_SIZE = 4
DEFAULTS = {
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
}


def make_dataset(num_records: int = 10, seed: int = 0, vocab_size: int = 40) -> Dataset:
    """Random prompts and responses of many lengths; states get one token more right an iteration."""
    rng = np.random.default_rng(seed)
    records = []
    for number in range(num_records):
        prompt, response = (rng.integers(3, vocab_size, size).tolist() for size in rng.integers((3, 2), (9, 15)))
        states = []
        for start in range(0, len(response), BLOCK_SIZE):
            fixed_point = response[start : start + BLOCK_SIZE]
            fixed_point += [0] * (BLOCK_SIZE - len(fixed_point))
            noise = rng.integers(3, vocab_size, BLOCK_SIZE).tolist()
            states.append([fixed_point[:right] + noise[right:] for right in range(BLOCK_SIZE)] + [fixed_point])
        records.append(
            {
                "data_id": str(number),
                "prompt": "",
                "response": "",
                "prompt_ids": prompt,
                "response_ids": response,
                "states": states,
                "is_greedy": True,
            }
        )
    return Dataset.from_list(records, features=FEATURES)


def make_tiny_model(dropout: float = 0.0):
    """A random model. It is scaled up so far that the losses of states are not small beside those of the text."""
    tokenizer = make_tokenizer()
    model = make_model("llama", scale=10.0, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    for module in [model.config, *model.modules()]:
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = dropout
    return model


def make_trainer(folder, dataset=None, lora=False, dropout=0.0, model=None, eval_dataset=None, **options):
    """A trainer of a tiny model, or of `model`, with an adapter if `lora` is true or a config of one."""
    if lora is True:
        lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", lora_dropout=dropout)
    return CLLMTrainer(
        make_tiny_model(dropout) if model is None else model,
        args=CLLMConfig(output_dir=str(folder), **{**DEFAULTS, **options}),
        train_dataset=make_dataset() if dataset is None else dataset,
        eval_dataset=eval_dataset,
        processing_class=make_tokenizer(),
        peft_config=lora or None,
    )


def weights_of(trainer) -> dict[str, torch.Tensor]:
    """Copies of all weights, under the names that they have without wrappers."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {name: weight.detach().clone() for name, weight in model.state_dict().items()}


def logs_of(trainer) -> list[dict[str, float]]:
    """Losses, counts and gradient norms of each log, without times."""
    kept = (
        "loss",
        "drafting_loss",
        "draft_accuracy",
        "consistency_loss",
        "ar_loss",
        "consistency_tokens",
        "ar_tokens",
        "grad_norm",
        "learning_rate",
    )
    names = (*kept, *(f"eval_{name}" for name in kept), "step")
    logs = [{name: log[name] for name in names if name in log} for log in trainer.state.log_history]
    return [log for log in logs if len(log) > 1]


def train(folder, num_records=10, num_evaluated=0, resume=None, sharded=False, **options) -> dict:
    """Train a run of a new model, from its start or a checkpoint, and give its logs and weights."""
    if sharded:
        parts = DistributedConfig(fsdp_size=torch.distributed.get_world_size())
        options["model"] = AutoModelForCausalLM.from_pretrained(folder.parent / "base", distributed_config=parts)
    evaluated = make_dataset(num_evaluated, seed=1) if num_evaluated else None
    trainer = make_trainer(folder, make_dataset(num_records), eval_dataset=evaluated, **options)
    trainer.train(resume_from_checkpoint=resume)
    if sharded:
        trainer.save_model(folder / "saved")
        return {"logs": logs_of(trainer)}
    return {"logs": logs_of(trainer), "weights": weights_of(trainer)}


def _run_process(folder: Path, runs: dict[str, dict], rank: int, num_processes: int, port: int) -> None:
    if num_processes > 1:
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_processes, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in places.items()}, MASTER_ADDR="127.0.0.1")
        torch.distributed.init_process_group("gloo")
    else:
        forbid_collectives()
    for name, options in runs.items():
        torch.save(train(folder / name, **options), folder / f"{name}-{rank}.pt")
        if num_processes > 1:
            torch.distributed.barrier()
    if num_processes > 1:
        torch.distributed.destroy_process_group()


def forbid_collectives() -> None:
    """Let everything of `torch.distributed` raise that starts or needs more than one process."""

    def refuse(*arguments, **options):
        raise AssertionError("torch.distributed was used with one process")

    names = (
        "init_process_group new_group barrier monitored_barrier send recv isend irecv reduce broadcast gather scatter"
    )
    names += " all_reduce all_gather all_gather_into_tensor reduce_scatter reduce_scatter_tensor all_to_all"
    names += " all_gather_object gather_object broadcast_object_list scatter_object_list"
    for name in names.split():
        assert hasattr(torch.distributed, name)
        for module in (torch.distributed, torch.distributed.distributed_c10d):
            setattr(module, name, refuse)


def main(folder: Path, num_processes: int) -> int:
    """Run the processes and wait for them."""
    runs = json.loads((folder / "runs.json").read_text())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    make_tiny_model().save_pretrained(folder / "base")
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_run_process, args=(folder, runs, rank, num_processes, port), daemon=True)
        for rank in range(num_processes)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=240)
    return max(1 if process.exitcode is None else abs(process.exitcode) for process in processes)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
