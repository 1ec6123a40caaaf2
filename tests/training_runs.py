"""
Small trainings, for tests that compare one with another; also a script that runs some of them in several processes.

    python -m torch.distributed.run --nproc_per_node 2 tests/training_runs.py FOLDER

trains the runs of `FOLDER/runs.json` one after the other and leaves what each process ended with in FOLDER.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from conftest import make_model
from datasets import Dataset
from peft import LoraConfig

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


def make_trainer(
    folder, dataset=None, lora=False, dropout=0.0, model=None, eval_dataset=None, callbacks=(), **options
):
    """A trainer of a tiny model, or of `model`, with an adapter if `lora` is true or a config of one."""
    tokenizer = make_tokenizer()
    if model is None:
        # Scaled up so far that the losses of the states are not small beside those of the text.
        model = make_model("llama", scale=10.0, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
        model.config.attention_dropout = dropout
        for module in model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = dropout
    if lora is True:
        lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", lora_dropout=dropout)
    return CLLMTrainer(
        model,
        args=CLLMConfig(output_dir=str(folder), **{**DEFAULTS, **options}),
        train_dataset=make_dataset() if dataset is None else dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        peft_config=lora or None,
    )


def weights_of(trainer) -> dict[str, torch.Tensor]:
    """Copies of all weights, under the names that they have without wrappers."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {name: weight.detach().clone() for name, weight in model.state_dict().items()}


def logs_of(trainer) -> list[dict[str, float]]:
    """Losses, counts and gradient norms of each log, without times."""
    kept = ("loss", "consistency_loss", "ar_loss", "consistency_tokens", "ar_tokens", "grad_norm", "learning_rate")
    names = (*kept, *(f"eval_{name}" for name in kept), "step")
    logs = [{name: log[name] for name in names if name in log} for log in trainer.state.log_history]
    return [log for log in logs if len(log) > 1]


def train(folder, num_records=10, num_evaluated=0, resume=None, save=False, **options) -> dict:
    """Train a run of a new model, from its start or a checkpoint, and give its logs and weights."""
    evaluated = make_dataset(num_evaluated, seed=1) if num_evaluated else None
    trainer = make_trainer(folder, make_dataset(num_records), eval_dataset=evaluated, **options)
    trainer.train(resume_from_checkpoint=resume)
    if save:
        trainer.save_model()
        return {"logs": logs_of(trainer)}
    return {"logs": logs_of(trainer), "weights": weights_of(trainer)}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for name, options in json.loads((folder / "runs.json").read_text()).items():
        result = train(folder / options.pop("folder", name), **options)
        rank = torch.distributed.get_rank()
        torch.save(result, folder / f"{name}-{rank}.pt")
        torch.distributed.barrier()
