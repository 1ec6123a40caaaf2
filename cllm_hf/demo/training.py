"""The sizes of the demo, and how it trains: a target model from scratch, a CLLM from it, a lossless adapter on it."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)
from trl import SFTConfig, SFTTrainer

from ..training.callbacks import show_progress
from ..training.config import CLLMConfig
from ..training.trainer import CLLMTrainer
from .problems import Problem


MODES = ("both", "cllm", "lossless")


@dataclass(frozen=True)
class DemoOptions:
    """Sizes of the demo. An optimizer step of the target model takes new problems each time."""

    mode: str = "both"  # what is made of the target model
    seed: int = 0  # of the problems, the weights and the order of the data
    largest_number: int = 9  # in a problem
    hidden_size: int = 96  # of the model, which has four layers; a head has 16
    target_updates: int = 650  # optimizer steps
    target_batch_size: int = 16
    num_responses: int = 1200  # problems whose responses both trainings read
    num_trajectories: int = 64  # of these, problems whose trajectories are collected, to look at
    cllm_updates: int = 230
    cllm_batch_size: int = 16
    cllm_learning_rate: float = 2e-3
    ar_loss_weight: float = 20.0  # this and the next two as in `CLLMConfig`
    position_decay: float | None = 4.0
    trajectory_source: str = "online"
    lossless_updates: int = 100
    lossless_batch_size: int = 16
    lossless_rank: int = 64
    lossless_markov_rank: int = 16
    lossless_block_size: int = 9
    num_held_out: int = 40  # problems for the measurement, in no training data
    block_size: int = 16
    max_new_tokens: int = 96  # a worked answer has at most 68

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"`mode` must be one of {', '.join(MODES)}, got {self.mode!r}.")


def make_model(tokenizer: PreTrainedTokenizerBase, hidden_size: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=4,
        num_attention_heads=max(hidden_size // 16, 1),
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


def copy_model(target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: DemoOptions) -> LlamaForCausalLM:
    """A copy under the same name, so that the target model's own weights stay."""
    model = make_model(tokenizer, options.hidden_size)
    model.load_state_dict(target.state_dict())
    model.name_or_path = target.name_or_path
    return model


def train_target(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[Problem],
    options: DemoOptions,
    callback: TrainerCallback,
) -> None:
    """Train the target model in place, on worked answers."""
    dataset = Dataset.from_list([{"prompt": f"{p.prompt} ", "completion": p.response} for p in problems])
    args = SFTConfig(
        max_steps=options.target_updates,
        per_device_train_batch_size=options.target_batch_size,
        **_training_options(options.seed, learning_rate=3e-3, warmup_steps=50),
    )
    trainer = SFTTrainer(model, args=args, train_dataset=dataset, processing_class=tokenizer)
    show_progress(trainer, "loss")
    trainer.add_callback(callback)
    trainer.train()
    # Training turns the cache off for good; the comparison is with decoding as it should be.
    model.config.use_cache = model.generation_config.use_cache = True
    model.eval()


def make_cllm_trainer(
    target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dataset: Dataset, options: DemoOptions
) -> CLLMTrainer:
    """A trainer of a copy of the target model on the responses of `dataset`."""
    args = CLLMConfig(
        max_steps=options.cllm_updates,
        per_device_train_batch_size=options.cllm_batch_size,
        ar_loss_weight=options.ar_loss_weight,
        position_decay=options.position_decay,
        trajectory_source=options.trajectory_source,
        block_size=options.block_size,
        plot_run=False,
        **_training_options(options.seed, options.cllm_learning_rate, warmup_steps=20),
    )
    model = copy_model(target, tokenizer, options)
    trainer = CLLMTrainer(model, args=args, train_dataset=dataset, processing_class=tokenizer)
    show_progress(trainer, "consistency_loss")
    return trainer


def make_lossless_trainer(
    target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dataset: Dataset, options: DemoOptions
) -> CLLMTrainer:
    """A trainer of a lossless adapter, on a copy of the target model, on the responses of `dataset`."""
    args = CLLMConfig(
        lossless=True,
        max_steps=options.lossless_updates,
        per_device_train_batch_size=options.lossless_batch_size,
        position_decay=6.0,
        markov_rank=options.lossless_markov_rank,
        drafts_per_response=10,
        block_size=options.lossless_block_size,
        plot_run=False,
        **_training_options(options.seed, learning_rate=2e-3, warmup_steps=0),
    )
    rank = options.lossless_rank
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    model = copy_model(target, tokenizer, options)
    trainer = CLLMTrainer(model, args=args, train_dataset=dataset, processing_class=tokenizer, peft_config=config)
    show_progress(trainer, "drafting_loss", "draft_accuracy")
    return trainer


def _training_options(seed: int, learning_rate: float, warmup_steps: int) -> dict[str, Any]:
    return {
        # Nothing is saved there: `save_strategy="no"`.
        "output_dir": tempfile.gettempdir(),
        "save_strategy": "no",
        "learning_rate": learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": warmup_steps,
        "adam_beta2": 0.98,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 10,
        "report_to": [],
        "seed": seed,
    }
