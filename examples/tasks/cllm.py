"""The steps `collect` and `train`: trajectories of the target model, and the CLLM that is trained on them."""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import set_seed

from cllm_hf._host import base_model_of
from cllm_hf.loading import load_tokenizer, pick_device
from cllm_hf.process import Process
from cllm_hf.training.callbacks import show_progress
from cllm_hf.training.checkpoints import newest_checkpoint
from cllm_hf.training.plotting import PLOT_NAME
from cllm_hf.training.trainer import CLLMTrainer
from cllm_hf.trajectories.builder import TrajectoryBuilder
from cllm_hf.trajectories.command import load_model
from cllm_hf.trajectories.loading import load_trajectories

from .models import loading_options, make_adapter, release, save_together
from .options import Options
from .task import Problem


_LOSSES = ("consistency_loss", "ar_loss")


def collect_trajectories(
    options: Options, target: str, problems: Sequence[Problem], folder: Path, show_bar: bool = True
) -> dict[str, int]:
    """
    Collect the trajectories of the target model's answers to training problems, or go on with that.

    Args:
        options (`Options`): of the pipeline.
        target (`str`): folder or Hub id of the target model.
        problems (`Sequence[Problem]`): training problems.
        folder (`pathlib.Path`): where to keep the trajectories.
        show_bar (`bool`): whether to draw a progress bar.

    Returns:
        `dict[str, int]`: prompts by what became of them, as `TrajectoryBuilder.counts`.

    Raises:
        OSError: as `TrajectoryBuilder.collect`.
        ValueError: as `TrajectoryBuilder.collect`.
    """
    section = options.collect
    model = load_for_decoding(options, target, section.dtype, section.device)
    builder = TrajectoryBuilder(
        model,
        load_tokenizer(target),
        show_progress=show_bar and Process.current().is_first,
        **options.collection(),
    )
    chosen = choose(problems, section.num_prompts, options.seed)
    # The number of its problem is the name of each record.
    dataset = Dataset.from_list([{"data_id": str(index), "prompt": problems[index].prompt} for index in chosen])
    builder.collect(dataset, folder, source=options.task.source, license=options.task.license)
    return dict(builder.counts)


def train_cllm(
    options: Options,
    target: str,
    problems: Sequence[Problem],
    trajectories: Path,
    folder: Path,
    checkpoints: Path,
    show_bar: bool = True,
) -> None:
    """
    Train the CLLM, which starts as the target model, from its newest checkpoint if there is one, and save it.

    Args:
        options (`Options`): of the pipeline.
        target (`str`): folder or Hub id of the target model.
        problems (`Sequence[Problem]`): training problems; their answers are the labels of `ar_labels="ground_truth"`.
        trajectories (`pathlib.Path`): folder of the trajectories.
        folder (`pathlib.Path`): where to save the model or adapter.
        checkpoints (`pathlib.Path`): for checkpoints.
        show_bar (`bool`): whether to draw a bar instead of lines.
    """
    set_seed(options.seed)
    args = options.cllm_config(checkpoints)
    args.model_init_kwargs = loading_options(options.model)
    tokenizer = load_tokenizer(target)
    dataset: Any = load_trajectories(trajectories, split="train")
    if args.ar_labels == "ground_truth":
        dataset = _add_labels(dataset, problems, tokenizer)
    held_out = load_trajectories(trajectories, split="test") if options.collect.test_fraction else None
    trainer = CLLMTrainer(
        target,
        args=args,
        train_dataset=dataset,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=make_adapter(options.model),
    )
    show_progress(trainer, *_LOSSES, bar=show_bar, show=Process.current().is_first)
    trainer.train(resume_from_checkpoint=newest_checkpoint(checkpoints))

    def save(new: Path) -> None:
        if Process.current().is_first and (checkpoints / PLOT_NAME).is_file():
            shutil.copyfile(checkpoints / PLOT_NAME, new / PLOT_NAME)  # the card shows it
        base_model_of(trainer.model).config.use_cache = True  # training turns it off for good
        trainer.save_model(str(new))

    save_together(folder, save)
    release(trainer)


def load_for_decoding(options: Options, name: str, dtype: str | None, device: str) -> Any:
    """
    Load a model that is not trained.

    Args:
        options (`Options`): of the pipeline.
        name (`str`): folder or Hub id.
        dtype (`str`, *optional*): of the weights, by default that of the section `model`.
        device (`str`): where to; each of several processes takes a GPU of its own for `"auto"`.

    Returns:
        `transformers.PreTrainedModel`, in evaluation mode.

    Raises:
        OSError: if there is no such model.
        ValueError: if there is no such device.
    """
    if device == "auto" and torch.cuda.is_available():
        device = f"cuda:{Process.current().local_index}"
    return load_model(
        name,
        dtype or options.model.dtype,
        pick_device(device),
        attn_implementation=options.model.attn_implementation,
    )


def choose(items: Sequence[Any], count: int | None, seed: int) -> list[int]:
    """
    Draw some of a list.

    Args:
        items (`Sequence`): the list.
        count (`int`, *optional*): how many, at most all; by default all.
        seed (`int`): the same seed gives the same ones, and those of a smaller number first.

    Returns:
        `list[int]`: their places.
    """
    order = list(range(len(items)))
    random.Random(seed).shuffle(order)
    return order[:count]


def _add_labels(dataset: Dataset, problems: Sequence[Problem], tokenizer: Any) -> Dataset:
    """A column `label_ids`: the tokens of the answers in the data, and the stop token."""
    texts = [problems[int(index)].response for index in dataset["data_id"]]
    labels = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    return dataset.add_column("label_ids", labels)
