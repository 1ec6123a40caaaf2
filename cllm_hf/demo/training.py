"""How the demo trains: a target model from scratch, a CLLM from it, and a lossless adapter on it."""

from __future__ import annotations

import tempfile
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from ..training.config import CLLMConfig
from ..training.progress import show_progress
from ..training.trainer import CLLMTrainer
from ..trajectories.builder import TrajectoryBuilder
from ..trajectories.showing import KEEP_ALL
from .options import DemoOptions
from .problems import Problem


def make_model(tokenizer: PreTrainedTokenizerBase, hidden_size: int) -> LlamaForCausalLM:
    """
    Make a new model of four layers.

    Args:
        tokenizer (`transformers.PreTrainedTokenizerBase`): its tokenizer.
        hidden_size (`int`): its width.

    Returns:
        `transformers.LlamaForCausalLM`.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


def copy_model(target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: DemoOptions) -> LlamaForCausalLM:
    """
    Copy the target model, so that its own weights stay.

    Args:
        target (`transformers.PreTrainedModel`): the target model.
        tokenizer (`transformers.PreTrainedTokenizerBase`): its tokenizer.
        options (`DemoOptions`): sizes.

    Returns:
        `transformers.LlamaForCausalLM`: under the same name.
    """
    model = make_model(tokenizer, options.hidden_size)
    model.load_state_dict(target.state_dict())
    model.name_or_path = target.name_or_path
    return model


def train_target(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, problems: list[Problem], options: DemoOptions
) -> None:
    """
    Train the target model on worked answers with `trl.SFTTrainer`.

    Args:
        model (`transformers.PreTrainedModel`): trained in place.
        tokenizer (`transformers.PreTrainedTokenizerBase`): its tokenizer.
        problems (`list[Problem]`): what to train on.
        options (`DemoOptions`): sizes.
    """
    dataset = Dataset.from_list([{"prompt": f"{p.prompt} ", "completion": p.response} for p in problems])
    args = SFTConfig(
        max_steps=options.target_updates,
        per_device_train_batch_size=options.target_batch_size,
        **_training_options(options.seed, learning_rate=2e-3),
    )
    trainer = SFTTrainer(model, args=args, train_dataset=dataset, processing_class=tokenizer)
    show_progress(trainer, "loss")
    trainer.train()
    # Training turns the cache off for good; the comparison is with decoding as it should be.
    model.config.use_cache = model.generation_config.use_cache = True
    model.eval()


def make_cllm_trainer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dataset: Dataset, options: DemoOptions
) -> CLLMTrainer:
    """
    Make the trainer of the CLLM.

    Args:
        model (`transformers.PreTrainedModel`): starts as the target model.
        tokenizer (`transformers.PreTrainedTokenizerBase`): its tokenizer.
        dataset (`datasets.Dataset`): the target model's trajectories.
        options (`DemoOptions`): sizes.

    Returns:
        `CLLMTrainer`.
    """
    args = CLLMConfig(
        max_steps=options.cllm_updates,
        per_device_train_batch_size=options.cllm_batch_size,
        ar_loss_weight=options.ar_loss_weight,
        position_decay=options.position_decay,
        trajectory_source=options.trajectory_source,
        block_size=options.block_size,
        plot_run=False,
        **_training_options(options.seed, options.cllm_learning_rate),
    )
    trainer = CLLMTrainer(model, args=args, train_dataset=dataset, processing_class=tokenizer)
    show_progress(trainer, "consistency_loss")
    return trainer


def make_lossless_trainer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dataset: Dataset, options: DemoOptions
) -> CLLMTrainer:
    """
    Make the trainer of the lossless adapter.

    Args:
        model (`transformers.PreTrainedModel`): a copy of the target model, which stays what it is.
        tokenizer (`transformers.PreTrainedTokenizerBase`): its tokenizer.
        dataset (`datasets.Dataset`): the target model's responses.
        options (`DemoOptions`): sizes.

    Returns:
        `CLLMTrainer`.
    """
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
    trainer = CLLMTrainer(model, args=args, train_dataset=dataset, processing_class=tokenizer, peft_config=config)
    show_progress(trainer, "drafting_loss", "draft_accuracy")
    return trainer


def make_builder(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: DemoOptions, show_progress: bool = True
) -> TrajectoryBuilder:
    """
    Make what collects a model's trajectories.

    Args:
        model (`transformers.PreTrainedModel`): the model.
        tokenizer (`transformers.PreTrainedTokenizerBase`): its tokenizer.
        options (`DemoOptions`): sizes.
        show_progress (`bool`): whether to draw a progress bar.

    Returns:
        `TrajectoryBuilder`.
    """
    return TrajectoryBuilder(
        model,
        tokenizer,
        options.block_size,
        options.max_new_tokens,
        options.seed,
        # Whatever the target model says: if it was trained for too short, the demo shows that.
        cleaning=KEEP_ALL,
        show_progress=show_progress,
    )


def _training_options(seed: int, learning_rate: float, warmup_steps: int = 40) -> dict[str, Any]:
    return {
        # Nothing is saved there: `save_strategy="no"`.
        "output_dir": tempfile.gettempdir(),
        "save_strategy": "no",
        "learning_rate": learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": warmup_steps,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 10,
        "report_to": [],
        "seed": seed,
    }
