"""From the options of `cllm benchmark` to a text and files: loads models and prompts, measures, writes."""

from __future__ import annotations

import argparse
import sys

import torch
from transformers import AutoTokenizer

from ..names import Name
from ..quiet import quiet_hosts
from ..trajectories.prompt_files import read_prompts
from .comparison import check_assistant, compare_decoding, format_comparison
from .model_command import run_models
from .preparing import check_outputs, finish, load_model, prepare_device, tokenize
from .shapes import make_random_model, random_prompts


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
        runs = {"decode": run_decode, "models": run_models}
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
    check_source(options)
    check_prompts(options)
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
        model = make_random_model(options.shape, options.seed, shape_dtype(options, device), device)
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


def check_prompts(options: argparse.Namespace) -> None:
    """
    Check that a model comes with prompts.

    Args:
        options (`argparse.Namespace`): with `model` and `prompts`.

    Raises:
        ValueError: if it does not.
    """
    if options.model is not None and options.prompts is None:
        raise ValueError("A model needs prompts, got `--model` without `--prompts`. Pass a file with a prompt a line.")


def check_source(options: argparse.Namespace) -> None:
    """
    Check that there is one thing to measure, under a name that can be one.

    Args:
        options (`argparse.Namespace`): with `model` and `shape`, and maybe `assistant`.

    Raises:
        OSError: if there is no such folder.
        ValueError: if there is none, or more than one.
    """
    if (options.model is None) == (options.shape is None):
        got = "neither" if options.model is None else "both"
        raise ValueError(f"Exactly one of `--model` and `--shape` says what to measure, got {got}.")
    for option in ("model", "assistant"):
        name = getattr(options, option, None)
        if name is not None:
            Name.find(name).check(f"--{option}", "model")


def shape_dtype(options: argparse.Namespace, device: torch.device) -> torch.dtype:
    """
    The dtype of a shape's weights.

    Args:
        options (`argparse.Namespace`): with `dtype`.
        device (`torch.device`): decides where that is `"auto"`.

    Returns:
        `torch.dtype`.
    """
    if options.dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return getattr(torch, options.dtype)
