"""The step `sft`: target model and draft model, trained on the answers of the data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase, set_seed
from trl import SFTTrainer

from cllm_hf.files import save_whole
from cllm_hf.loading import load_tokenizer
from cllm_hf.process import Process
from cllm_hf.training.callbacks import show_progress
from cllm_hf.training.checkpoints import newest_checkpoint
from cllm_hf.trajectories.prompts import encode_prompts, render_chat

from .model_options import ModelOptions
from .models import (
    loading_options,
    make_adapter,
    make_model,
    make_tokenizer,
    release,
    save_together,
    wait_for_all,
)
from .options import Options
from .task import Problem


_TOKENIZER = "tokenizer"


def find_tokenizer(model: ModelOptions, problems: Sequence[Problem], checkpoints: Path) -> PreTrainedTokenizerBase:
    """
    Load the tokenizer of a model; for a model from scratch train one, once.

    Args:
        model (`ModelOptions`): the model.
        problems (`Sequence[Problem]`): training problems.
        checkpoints (`pathlib.Path`): where a trained tokenizer is kept.

    Returns:
        `transformers.PreTrainedTokenizerBase`.

    Raises:
        OSError: if it cannot be loaded.
        ValueError: for chat messages and a model from scratch.
    """
    if model.name is not None:
        return load_tokenizer(model.name)
    kept = checkpoints / _TOKENIZER
    if Process.current().is_first and not kept.exists():
        texts = []
        for problem in problems:
            if not isinstance(problem.prompt, str):
                raise ValueError("A model from scratch has no chat template, got chat messages. Use prompts of text.")
            texts.append(problem.prompt + problem.response)
        checkpoints.mkdir(parents=True, exist_ok=True)
        save_whole(kept, make_tokenizer(texts, model.vocab_size, model.split_spaces).save_pretrained)
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
    if args.completion_only_loss is None:
        args.completion_only_loss = True  # TRL sees no `prompt` among the columns
    adapter = make_adapter(model)
    if model.name is not None:
        args.model_init_kwargs = loading_options(model)
    start: Any = model.name if model.name is not None else make_model(model, tokenizer)
    trainer = SFTTrainer(start, args=args, train_dataset=dataset, processing_class=tokenizer, peft_config=adapter)
    show_progress(trainer, "loss", bar=show_bar, show=Process.current().is_first)
    trainer.train(resume_from_checkpoint=newest_checkpoint(checkpoints))
    save_together(folder, lambda new: _save(trainer, new, has_adapter=adapter is not None))
    release(trainer)
    return len(dataset)


def make_sft_dataset(
    problems: Sequence[Problem], tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> Dataset:
    """
    Make a dataset of prompts and completions, without those that are too long: cut ones would teach to end anywhere.

    Texts are turned into tokens here, all at once, since TRL does so one by one.

    Args:
        problems (`Sequence[Problem]`): training problems.
        tokenizer (`transformers.PreTrainedTokenizerBase`): the model's tokenizer.
        max_length (`int`, *optional*): most tokens of prompt, response and stop token.

    Returns:
        `datasets.Dataset`: with columns `input_ids` and `completion_mask`; for chat messages `prompt` and
        `completion`.

    Raises:
        ValueError: if none is left, or some prompts are texts and others messages.
    """
    is_text = {isinstance(problem.prompt, str) for problem in problems}
    if len(is_text) > 1:
        raise ValueError("Prompts must all be texts, or all chat messages, got both.")
    rows = _text_rows(problems, tokenizer) if is_text == {True} else _chat_rows(problems, tokenizer)
    kept = [row for length, row in rows if max_length is None or length <= max_length]
    if not kept:
        raise ValueError(
            f"No training problem has at most {max_length} tokens, the shortest has "
            f"{min(length for length, _ in rows)}. Raise `sft.max_length`."
        )
    return Dataset.from_list(kept)


def _text_rows(problems: Sequence[Problem], tokenizer: Any) -> list[tuple[int, dict[str, Any]]]:
    """Tokens of each row, and their number."""
    stop = tokenizer.eos_token_id
    prompts = encode_prompts([str(problem.prompt) for problem in problems], tokenizer)
    whole = encode_prompts([f"{problem.prompt}{problem.response}" for problem in problems], tokenizer)
    rows = []
    for problem, prompt, ids in zip(problems, prompts, whole):
        ids = ids[:-1] if problem.response and ids[-1:] == [stop] else ids  # which some data have already
        if ids[: len(prompt)] != prompt:  # a token reaches over the border
            ids = prompt + tokenizer(problem.response, add_special_tokens=False)["input_ids"]
        ids = [*ids, stop]
        mask = [0] * len(prompt) + [1] * (len(ids) - len(prompt))
        rows.append((len(ids), {"input_ids": ids, "completion_mask": mask}))
    return rows


def _chat_rows(problems: Sequence[Problem], tokenizer: Any) -> list[tuple[int, dict[str, Any]]]:
    """Messages of each row, and the number of their tokens."""
    answers = [[{"role": "assistant", "content": problem.response}] for problem in problems]
    rows = [{"prompt": problem.prompt, "completion": answer} for problem, answer in zip(problems, answers)]
    texts = [
        render_chat([*row["prompt"], *row["completion"]], tokenizer, f"problem {number}", is_answered=True)
        for number, row in enumerate(rows)
    ]
    return [(len(ids), row) for ids, row in zip(tokenizer(texts, add_special_tokens=False)["input_ids"], rows)]


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
    elif Process.current().is_first:
        model.save_pretrained(folder)
        trainer.processing_class.save_pretrained(folder)  # type: ignore[union-attr]
