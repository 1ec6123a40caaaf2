"""`cllm inspect`, which shows what is in a dataset, and `cllm show`, which shows how a model decodes a prompt."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import pyarrow.compute as pc
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from transformers import AutoTokenizer
from transformers.utils import find_adapter_config_file

from .._host import adapter_layers, base_model_of
from ..blocks.drafter import find_drafter
from ..files import check_writable_file, write_whole
from ..loading import check_same_tokenizer, load_tokenizer, pick_device
from ..names import Name
from ..process import quiet_hosts
from ..trajectories.command import load_all, load_model
from ..trajectories.loading import find_manifest
from ..trajectories.prompts import Prompt
from ..trajectories.schema import check_names
from ..trajectories.sources import PLACE, apply_template, as_chat, read_source
from ..trajectories.statistics import format_histogram, format_statistics, measure_trajectories, plot_statistics
from .picture import TrajectoryPicture, collect_block, draw_blocks, token_decoder
from .terminal import BlockTrajectory, format_record, indented


_BLOCK_SIZE = 16  # of models that have no Jacobi defaults
_TAG = "cllm"  # of the cards that `CLLMTrainer` writes


def run_inspect(options: argparse.Namespace, color: bool = True) -> str:
    """Run `cllm inspect`: a record, or statistics."""
    of_all = options.statistics or options.compare is not None or options.plot is not None
    names = ("record", "data_id", "block", "tokenizer", "picture")
    of_one = [name for name in names if getattr(options, name) is not None]
    if of_all and of_one:
        raise ValueError(
            f"Statistics are those of the whole dataset, got `--{of_one[0].replace('_', '-')}` with `--statistics`, "
            "`--compare` or `--plot`. Drop one of them."
        )
    for path in (options.plot, options.picture):
        if path is not None:
            check_writable_file(path)
    dataset = load_all(options.dataset, options)
    return _statistics_of(dataset, options) if of_all else _record_of(dataset, options, color)


def _statistics_of(dataset: Dataset, options: argparse.Namespace) -> str:
    named = {"dataset": measure_trajectories(dataset)}
    if options.compare is not None:
        after = measure_trajectories(load_all(options.compare, options))
        named = {"before": named["dataset"], "after": after}
    parts = [format_statistics(named)]
    for name, statistics in named.items():
        if statistics.num_blocks:
            title = [] if options.compare is None else [f"{name.capitalize()}:"]
            parts += [*title, format_histogram(statistics)]
    if options.plot is not None:
        plot_statistics(named, options.plot)
        parts.append(f"Written: {options.plot}")
    return "\n\n".join(parts)


def _record_of(dataset: Dataset, options: argparse.Namespace, color: bool) -> str:
    decode, note = _find_decoder(options)
    record = dataset[_find_row(dataset, options.record or 0, options.data_id)]
    if options.picture is not None:
        check_names(record)
    parts = [*note, format_record(record, decode, color, options.block)]
    if options.picture is not None:
        blocks = [BlockTrajectory.of(record, number, f"Block {number}") for number in options.block or [0]]
        title, caption = f"`data_id` {record.get('data_id', '?')}", f"Prompt: {record.get('prompt', '')}"
        write_whole(options.picture, draw_blocks(blocks, decode, title, caption))
        parts.append(f"Written: {options.picture}")
    return "\n\n".join(parts)


def _find_row(dataset: Dataset, number: int, data_id: str | None) -> int:
    if data_id is not None:
        number = -1
        if "data_id" in dataset.column_names:
            ids = dataset.select_columns(["data_id"]).with_format("arrow")[:]["data_id"]
            number = pc.index(ids, data_id).as_py()
        if number < 0:
            raise ValueError(
                f"`--data-id` must be that of a record, got {data_id!r}, which none of {len(dataset)} has. It may "
                "have been dropped; `--record N` takes a record by its number."
            )
    if number >= len(dataset):
        raise ValueError(f"`--record` must be from 0 to {len(dataset) - 1}, got {number}. Choose one of those.")
    return number


def _find_decoder(options: argparse.Namespace) -> tuple[Callable[[int], str], list[str]]:
    """What gives the text of a token, and a note if that is its number."""
    name = options.tokenizer or find_manifest(options.dataset, options.config_name).get("tokenizer", {}).get("name")
    try:
        if not name:
            raise ValueError("the dataset does not name one")
        return token_decoder(AutoTokenizer.from_pretrained(name)), []
    except Exception as error:  # there are many ways not to be a tokenizer
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if options.tokenizer is not None:
            raise ValueError(f"`--tokenizer` must be that of the dataset, got {name!r} ({reason}).") from error
        note = f"Tokens are shown by their ids: there is no tokenizer ({reason}). Pass it as `--tokenizer`."
        return str, [note]


def run_show(options: argparse.Namespace, color: bool = True) -> str:
    """
    Run `cllm show`: the trajectories, and what is to be said of them.

    All that can be wrong before a model is loaded is found before. Of a lossless adapter, which leaves its base
    model's text as it is, the base model's trajectory is shown, and what the adapter consists of.
    """
    Name.find(options.model).check("--model", "model")
    if options.target is not None:
        Name.find(options.target).check("--target", "model")
    if options.output is not None:
        if options.output.suffix.lower() != ".png":
            raise ValueError(
                f"`--output` must be a PNG file, got {str(options.output)!r}. Name one that ends in .png."
            )
        check_writable_file(options.output)
    prompt = _read_prompt(options)
    device = pick_device(options.device)
    own = Name.find(options.model).short
    with quiet_hosts(keep_bars=sys.stderr.isatty()):
        tokenizer = load_tokenizer(options.model, None, options.trust_remote_code)
        model = _load(options.model, options, device)
        block_size = options.block_size or _block_size_of(model)

        def collect(model: Any, name: str) -> tuple[str, BlockTrajectory]:
            return collect_block(
                model, tokenizer, prompt, name, block_size, options.block, options.max_new_tokens, options.seed
            )

        about = describe_lossless_adapter(model, options.model)
        base = find_target_name(options.model) if about else None
        text, block = collect(model, f"Base model: {Name.find(base).short}" if base else f"CLLM: {own}")
        blocks = [block]
        del model  # the memory of a machine may hold one only
        target, reason = _find_target(options, device) if options.target or not about else (None, None)
        if target is not None:
            name = target.name_or_path
            check_same_tokenizer(name, tokenizer, text)
            blocks.insert(0, collect(target, f"Target model: {Name.find(name).short}")[1])
    picture = TrajectoryPicture(text, blocks, token_decoder(tokenizer))
    parts = [*([about] if about else []), picture.format(color)]
    if reason is not None:
        parts.append(f"Only {own} is shown: {reason}. Pass its target model as `--target`.")
    if options.output is not None:
        picture.save(options.output)
        parts.append(f"Written: {options.output}")
    return "\n\n".join(parts)


def describe_lossless_adapter(model: Any, name: str) -> str:
    """What a lossless adapter consists of, which was loaded from `name`; empty for any other model."""
    base_model = base_model_of(model)
    drafter = find_drafter(base_model)
    if drafter is None:
        return ""
    config = model.active_peft_config
    names, layers = zip(*adapter_layers(base_model))
    sizes = [weight.numel() for layer in layers for key, weight in layer.named_parameters() if "lora_" in key]
    num_weights = sum(sizes) + sum(weight.numel() for weight in drafter.parameters())
    lines = [
        f"Base model: {config.base_model_name_or_path or 'not named'}",
        f"LoRA: rank {config.r}, alpha {config.lora_alpha}, on {len(layers)} layers "
        f"({', '.join(sorted({key.split('.')[-1] for key in names}))})",
        f"Drafter: {drafter.num_masks} masks, for a block size of at most {drafter.num_masks + 1}; "
        + (f"Markov head of rank {drafter.markov_rank}" if drafter.markov_rank else "no Markov head"),
        f"Weights: {num_weights:,}, {num_weights / max(base_model.num_parameters() - num_weights, 1):.1%} of the base "
        "model's",
    ]
    return (
        f"{Name.find(name).short} is a lossless adapter: it drafts, and its base model verifies, whose text stays as "
        f"it is.\n{indented(chr(10).join(lines))}"
    )


def find_target_name(name: str) -> str | None:
    """
    The folder or Hub id of the model that a CLLM was made from, if that is known: an adapter says it, and the card of
    a whole model if that is on the Hub.
    """
    if find_adapter_config_file(name) is not None:
        from peft import PeftConfig

        return PeftConfig.from_pretrained(name).base_model_name_or_path or None
    folder = Name.find(name).path
    try:
        # What a model was made from that has nothing to do with CLLMs is no target model.
        data = ModelCard.load(name if folder is None else folder / "README.md").data
        base = data.get("base_model") if _TAG in (data.get("tags") or ()) else None
    except Exception:  # no card, no network, or what the parser of YAML does not take
        return None
    return base if isinstance(base, str) else None


def _find_target(options: argparse.Namespace, device: torch.device) -> tuple[Any, str | None]:
    """The target model, or why there is none."""
    if options.target is not None:
        return _load(options.target, options, device), None
    name = find_target_name(options.model)
    if name is None:
        return None, "it does not say which model it was made from"
    try:
        return _load(name, options, device), None
    except OSError as error:
        return None, f"{name}, which it was made from, cannot be loaded ({str(error).strip().splitlines()[0]})"


def _load(name: str, options: argparse.Namespace, device: torch.device) -> Any:
    return load_model(name, options.dtype, device, trust_remote_code=options.trust_remote_code)


def _read_prompt(options: argparse.Namespace) -> Prompt:
    """The prompt as `cllm collect` reads it: text as it is, or from a file also chat messages and token ids."""
    if PLACE not in options.prompt_template:
        raise ValueError(
            f"`--prompt-template` must have {PLACE} where the prompt goes, got {options.prompt_template!r}."
        )
    if options.prompts is None:
        if options.number is not None:
            raise ValueError(
                f"`--number` chooses a prompt of `--prompts`, got {options.number} with `--prompt`. Drop it."
            )
        if not options.prompt:
            raise ValueError("`--prompt` must hold text, got none. Write a prompt of the kind that it was trained on.")
        prompt = apply_template(options.prompt_template, options.prompt)
        return as_chat(prompt) if options.chat else prompt
    number = options.number or 1
    prompts, _ = read_source(
        str(options.prompts), limit=number, template=options.prompt_template, is_chat=options.chat
    )
    if number > len(prompts):
        raise ValueError(
            f"`--number` must be from 1 to {len(prompts)}, the prompts of {str(options.prompts)!r}, got {number}. "
            "Choose one of those."
        )
    return prompts[number - 1]


def _block_size_of(model: Any) -> int:
    size = getattr(model.generation_config, "jacobi_block_size", None)
    return size if isinstance(size, int) else _BLOCK_SIZE
