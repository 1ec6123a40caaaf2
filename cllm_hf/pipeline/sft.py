"""The step `sft`: target model and draft model, trained on the answers of the data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase, set_seed
from trl import SFTTrainer

from ..files import save_whole
from ..loading import load_tokenizer
from ..training.progress import show_progress
from ..training.resuming import newest_checkpoint
from .models import (
    is_first_process,
    loading_options,
    make_adapter,
    make_model,
    make_tokenizer,
    save_together,
    wait_for_all,
)
from .options import ModelOptions, Options
from .task import Problem


_TOKENIZER = "tokenizer"


def find_tokenizer(model: ModelOptions, problems: Sequence[Problem], checkpoints: Path) -> PreTrainedTokenizerBase:
    """
    Load the tokenizer of a model; for a model from nothing train one, once.

    Args:
        model (`ModelOptions`): the model.
        problems (`Sequence[Problem]`): training problems.
        checkpoints (`pathlib.Path`): where a trained tokenizer is kept.

    Returns:
        `transformers.PreTrainedTokenizerBase`.

    Raises:
        OSError: if it cannot be loaded.
        ValueError: for chat messages and a model from nothing.
    """
    if model.name is not None:
        return load_tokenizer(model.name)
    kept = checkpoints / _TOKENIZER
    if is_first_process() and not kept.exists():
        texts = []
        for problem in problems:
            if not isinstance(problem.prompt, str):
                raise ValueError("A model from nothing has no chat template, got chat messages. Use prompts of text.")
            texts.append(problem.prompt + problem.response)
        checkpoints.mkdir(parents=True, exist_ok=True)
        save_whole(kept, make_tokenizer(texts, model.vocab_size).save_pretrained)
    wait_for_all()
    return load_tokenizer(str(kept))


def train_by_sft(
    options: Options,
    model: ModelOptions,
    problems: Sequence[Problem],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    checkpoints: Path,
    show_bar: bool = True,
) -> int:
    """
    Train a model with `trl.SFTTrainer`, from its newest checkpoint if there is one, and save it.

    Args:
        options (`Options`): of the pipeline.
        model (`ModelOptions`): what to train.
        problems (`Sequence[Problem]`): training problems. Those of more than `max_length` tokens are left out.
        tokenizer (`transformers.PreTrainedTokenizerBase`): its tokenizer.
        folder (`pathlib.Path`): where to save the model; an adapter is merged into it.
        checkpoints (`pathlib.Path`): for checkpoints.
        show_bar (`bool`): whether to draw a bar instead of lines.

    Returns:
        `int`: problems that it was trained on.

    Raises:
        ValueError: if no problem is short enough.
    """
    set_seed(options.seed)
    args = options.sft_config(checkpoints, model.sft)
    dataset = make_sft_dataset(problems, tokenizer, args.max_length)
    adapter = make_adapter(model)
    if model.name is not None:
        args.model_init_kwargs = loading_options(model)
    start: Any = model.name if model.name is not None else make_model(model, tokenizer)
    trainer = SFTTrainer(start, args=args, train_dataset=dataset, processing_class=tokenizer, peft_config=adapter)
    show_progress(trainer, "loss", bar=show_bar, show=is_first_process())
    trainer.train(resume_from_checkpoint=newest_checkpoint(checkpoints))
    save_together(folder, lambda new: _save(trainer, new, has_adapter=adapter is not None))
    return len(dataset)


def make_sft_dataset(
    problems: Sequence[Problem], tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> Dataset:
    """
    Make a dataset of prompts and completions, without those that are too long: cut ones would teach to end anywhere.

    Args:
        problems (`Sequence[Problem]`): training problems.
        tokenizer (`transformers.PreTrainedTokenizerBase`): the model's tokenizer.
        max_length (`int`, *optional*): most tokens of prompt, response and stop token.

    Returns:
        `datasets.Dataset`: with columns `prompt` and `completion`, as texts or chat messages.

    Raises:
        ValueError: if none is left.
    """
    rows: list[dict[str, Any]] = []
    texts = []
    for problem in problems:
        if isinstance(problem.prompt, str):
            rows.append({"prompt": problem.prompt, "completion": problem.response})
            texts.append(problem.prompt + problem.response)
        else:
            answer = [{"role": "assistant", "content": problem.response}]
            rows.append({"prompt": problem.prompt, "completion": answer})
            texts.append(str(tokenizer.apply_chat_template([*problem.prompt, *answer], tokenize=False)))
    if max_length is not None:
        lengths = [len(ids) + 1 for ids in tokenizer(texts)["input_ids"]]
        rows = [row for row, length in zip(rows, lengths) if length <= max_length]
        if not rows:
            raise ValueError(
                f"No training problem has at most {max_length} tokens, the shortest has {min(lengths)}. Raise "
                "`sft.max_length`."
            )
    return Dataset.from_list(rows)


def _save(trainer: SFTTrainer, folder: Path, has_adapter: bool) -> None:
    model: Any = trainer.model
    if has_adapter:
        model = model.merge_and_unload()
    # Training turns the cache off for good.
    model.config.use_cache = True
    if model.generation_config is not None:
        model.generation_config.use_cache = True
    if not has_adapter:
        trainer.save_model(str(folder))
    elif is_first_process():
        model.save_pretrained(folder)
        trainer.processing_class.save_pretrained(folder)  # type: ignore[union-attr]
