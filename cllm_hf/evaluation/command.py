"""From the options of `cllm benchmark` to a text and files: loads models and prompts, measures, writes."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, GenerationConfig

from .._host import base_model_of
from ..names import Name
from ..quiet import quiet_hosts
from ..trajectories.loading import load_trajectories
from ..trajectories.prompt_files import read_prompts
from ..trajectories.schema import FEATURES
from .collection import compare_collection, format_collection
from .collectors import CollectionSetting
from .comparison import check_assistant, compare_decoding, format_comparison
from .model_command import run_models
from .overhead import format_overhead, measure_overhead, overhead_methods
from .preparing import check_outputs, finish, load_model, prepare_device, tokenize
from .shapes import make_number_tokenizer, make_random_model, random_prompts


# Of the random trajectories of `cllm benchmark train`.
_RANDOM_SIZES = {"prompt_length": 64, "response_length": 128, "block_size": 16}


def run_benchmark(options: argparse.Namespace) -> str:
    """
    Run `cllm benchmark`, of any kind.

    Args:
        options (`argparse.Namespace`): its options, by their names, and the `command_line`.

    Returns:
        `str`: the result as Markdown.

    Raises:
        OSError: if a file cannot be read or written, or a model cannot be loaded.
        ValueError: if options contradict each other or prompts are not usable.
    """
    with quiet_hosts(keep_bars=sys.stderr.isatty()):
        runs = {
            "decode": run_decode,
            "models": run_models,
            "overhead": run_overhead,
            "collect": run_collect,
            "train": run_train,
        }
        return runs[options.kind](options)


def run_decode(options: argparse.Namespace) -> str:
    """
    Run `cllm benchmark decode`.

    Args:
        options (`argparse.Namespace`): its options, by their names, and the `command_line`.

    Returns:
        `str`: the result as Markdown.

    Raises:
        OSError: if a file cannot be read or written, or a model cannot be loaded.
        ValueError: if options contradict each other or prompts are not usable.
    """
    _check_source(options)
    _check_prompts(options)
    if options.shape is not None and (options.prompts is not None or options.assistant is not None):
        raise ValueError(
            "A shape has no tokenizer and no assistant, got `--shape` with `--prompts` or `--assistant`. Drop them, "
            "or pass `--model`."
        )
    check_assistant(options.assistant, options.batch_size)
    texts = [] if options.prompts is None else read_prompts(options.prompts, options.num_prompts)
    check_outputs(options)
    device = prepare_device(options)
    assistant, pad_token_id = None, 0
    if options.model is None:
        model = make_random_model(options.shape, options.seed, _shape_dtype(options, device), device)
        prompts = random_prompts(model.config.vocab_size, options.num_prompts, options.prompt_length, options.seed)
    else:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        prompts = tokenize(tokenizer, texts)
        pad_token_id = tokenizer.pad_token_id or 0
        model = load_model(options.model, options, device)
        assistant = None if options.assistant is None else load_model(options.assistant, options, device)
    report = compare_decoding(
        model,
        prompts,
        options.block_sizes,
        options.max_new_tokens,
        options.batch_size,
        options.repeats,
        assistant,
        options.compile,
        pad_token_id,
        show_progress=sys.stderr.isatty(),
        candidates=options.candidates,
    )
    return finish({**report, "name": options.model or options.shape}, format_comparison(report), options)


def run_overhead(options: argparse.Namespace) -> str:
    """
    Run `cllm benchmark overhead`.

    Args:
        options (`argparse.Namespace`): its options, by their names, and the `command_line`.

    Returns:
        `str`: the result as Markdown.

    Raises:
        OSError: if a file cannot be written or a model cannot be loaded.
        ValueError: if options contradict each other.
    """
    if options.model is None and options.shape is None:
        options.shape = ["4m", "125m"]
    _check_source(options)
    check_outputs(options)
    device = prepare_device(options)
    reports = []
    for name in options.shape or [options.model]:
        if options.model is None:
            model = make_random_model(name, options.seed, _shape_dtype(options, device), device)
        else:
            model = load_model(name, options, device)
            # Every iteration counts, also behind the end of the text, and none of the model's own processors.
            base_model_of(model).generation_config = model.generation_config = GenerationConfig(pad_token_id=0)
        vocab_size = model.config.get_text_config().vocab_size
        prompt = random_prompts(vocab_size, 1, options.prompt_length, options.seed)[0]
        methods = overhead_methods(model, options.block_sizes, options.compile)
        report = measure_overhead(
            methods, prompt, options.iterations, options.rounds, show_progress=sys.stderr.isatty()
        )
        reports.append({**report, "name": name})
        del model, methods
    return finish({"kind": "overhead", "reports": reports}, format_overhead(reports), options)


def run_collect(options: argparse.Namespace) -> str:
    """
    Run `cllm benchmark collect`.

    Args:
        options (`argparse.Namespace`): its options, by their names, and the `command_line`.

    Returns:
        `str`: the result as Markdown.

    Raises:
        OSError: if a file cannot be read or written, or a model cannot be loaded.
        ValueError: if options contradict each other or prompts are not usable.
    """
    _check_source(options)
    _check_prompts(options)
    if options.shape is not None and options.prompts is not None:
        raise ValueError(
            "A shape has prompts of its own, got `--shape` with `--prompts`. Drop one of the two, or pass `--model`."
        )
    texts = [] if options.prompts is None else read_prompts(options.prompts, options.num_prompts)
    check_outputs(options)
    device = prepare_device(options)
    if options.model is None:
        model = make_random_model(options.shape, options.seed, _shape_dtype(options, device), device)
        tokenizer: Any = make_number_tokenizer(model.config.vocab_size)
        rows = random_prompts(model.config.vocab_size, options.num_prompts, options.prompt_length, options.seed)
        texts = [" ".join(map(str, row)) for row in rows]
    else:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        tokenize(tokenizer, texts)
        model = load_model(options.model, options, device)
    setting = CollectionSetting(options.block_size, options.max_new_tokens, options.seed, options.max_tokens_per_batch)
    report = compare_collection(
        model,
        tokenizer,
        texts,
        setting,
        options.num_published,
        options.rounds,
        options.response_lengths,
        options.block_sizes,
        show_progress=sys.stderr.isatty(),
    )
    return finish({**report, "name": options.model or options.shape}, format_collection(report), options)


def run_train(options: argparse.Namespace) -> str:
    """
    Run `cllm benchmark train`.

    Args:
        options (`argparse.Namespace`): its options, by their names, and the `command_line`.

    Returns:
        `str`: the result as Markdown.

    Raises:
        OSError: if a file cannot be read or written, or a model or dataset cannot be loaded.
        ValueError: if options contradict each other, trajectories are not usable, or both ways differ in their losses.
    """
    _check_source(options)
    if (options.model is None) != (options.trajectories is None):
        raise ValueError(
            "A model comes with its trajectories, a shape makes its own, got "
            + ("`--trajectories` with `--shape`." if options.model is None else "`--model` without `--trajectories`.")
            + " Pass a folder that `cllm collect` has written, or a shape alone."
        )
    sizes = {name: getattr(options, name) for name in _RANDOM_SIZES if getattr(options, name) is not None}
    if options.model is not None and sizes:
        names = ", ".join(f"`--{name.replace('_', '-')}`" for name in sizes)
        raise ValueError(f"Trajectories have sizes of their own, got {names} with `--trajectories`. Drop that.")
    check_outputs(options)
    device = prepare_device(options)
    from .training import compare_training, format_training  # loads the trainer, which others do without
    from .training_methods import TrainingSetting, random_trajectories

    setting = TrainingSetting(
        options.batch_size,
        options.steps,
        options.rounds,
        options.states_per_block,
        options.gradient_checkpointing,
        options.seed,
    )
    if options.model is None:
        model = make_random_model(options.shape, options.seed, _shape_dtype(options, device), device)
        vocab_size, count = model.config.vocab_size, setting.batch_size * setting.steps
        tokenizer: Any = make_number_tokenizer(vocab_size)
        tokenizer.pad_token = "0"  # the trainer wants one; padding is masked everywhere
        records = random_trajectories(vocab_size, count, **{**_RANDOM_SIZES, **sizes}, seed=options.seed)
        dataset = Dataset.from_list(records, features=FEATURES)
    else:
        dataset = load_trajectories(options.trajectories)
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        model = load_model(options.model, options, device)
    report = compare_training(model, tokenizer, dataset, setting, show_progress=sys.stderr.isatty())
    return finish({**report, "name": options.model or options.shape}, format_training(report), options)


def _check_prompts(options: argparse.Namespace) -> None:
    if options.model is not None and options.prompts is None:
        raise ValueError("A model needs prompts, got `--model` without `--prompts`. Pass a file with a prompt a line.")


def _check_source(options: argparse.Namespace) -> None:
    if (options.model is None) == (options.shape is None):
        got = "neither" if options.model is None else "both"
        raise ValueError(f"Exactly one of `--model` and `--shape` says what to measure, got {got}.")
    for option in ("model", "assistant"):
        name = getattr(options, option, None)
        if name is not None:
            Name.find(name).check(f"--{option}", "model")


def _shape_dtype(options: argparse.Namespace, device: torch.device) -> torch.dtype:
    if options.dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return getattr(torch, options.dtype)
