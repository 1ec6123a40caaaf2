"""Trajectories made by hand, and short trainings on them."""

import numpy as np
from datasets import Dataset

from cllm_hf import FEATURES, CLLMConfig, CLLMTrainer


BLOCK_SIZE = 5


def make_record(response, number=0, prompt=(3, 4, 5), draft=None, settled=False):
    """Blocks with one draft before the fixed point, or with none if they are settled."""
    blocks = []
    for start in range(0, len(response), BLOCK_SIZE):
        fixed_point = (list(response[start : start + BLOCK_SIZE]) + [0] * BLOCK_SIZE)[:BLOCK_SIZE]
        first = draft or [prompt[(start + i) % len(prompt)] for i in range(BLOCK_SIZE)]
        blocks.append([fixed_point] if settled else [first, fixed_point])
    return {
        "data_id": f"data_{number}",
        "prompt": "",
        "response": "",
        "prompt_ids": list(prompt),
        "response_ids": list(response),
        "states": blocks,
        "is_greedy": True,
    }


def make_dataset(responses, **options):
    rng = np.random.default_rng(0)
    records = [
        make_record(response, number, rng.integers(6, 30, 3 + number % 3).tolist(), **options)
        for number, response in enumerate(responses)
    ]
    return Dataset.from_list(records, features=FEATURES)


def good_responses(count=16, length=18):
    """Tokens at random: hardly any 4 of them stand twice."""
    rng = np.random.default_rng(1)
    return [rng.integers(6, 40, length - number % 4).tolist() for number in range(count)]


def make_trainer(
    model, dataset, tokenizer, output_dir, eval_dataset=None, peft_config=None, callbacks=None, **options
):
    defaults = {
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "plot_run": False,
    }
    return CLLMTrainer(
        model,
        args=CLLMConfig(output_dir=str(output_dir), **{**defaults, **options}),
        train_dataset=dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        peft_config=peft_config,
        callbacks=callbacks,
    )
