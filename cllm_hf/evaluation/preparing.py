"""What every `cllm benchmark` does before it measures and after: checks, device, models, prompts and files."""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from textwrap import indent
from typing import Any

import torch

from ..files import check_writable_file, write_whole
from ..loading import load_cllm, pick_device


SCHEMA_VERSION = 1


def check_outputs(options: argparse.Namespace) -> None:
    """
    Check before the run that its results can be written.

    Args:
        options (`argparse.Namespace`): with `json`, `markdown` and maybe `plot`, each a path or `None`.

    Raises:
        OSError: if a file cannot be written.
        ValueError: if two of them are the same file.
    """
    named = {f"`--{name}`": getattr(options, name, None) for name in ("json", "markdown", "plot")}
    given = {name: path for name, path in named.items() if path is not None}
    for (first, path), (second, other) in itertools.combinations(given.items(), 2):
        if path == other:
            raise ValueError(f"{first} and {second} must be two files, got {str(path)!r} for both.")
    for path in given.values():
        check_writable_file(path)


def prepare_device(options: argparse.Namespace) -> torch.device:
    """
    Set the number of threads and find the device.

    Args:
        options (`argparse.Namespace`): with `threads`, a number or `None`, and `device`.

    Returns:
        `torch.device`.

    Raises:
        ValueError: if this machine has no such device.
    """
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    return pick_device(options.device)


def load_model(name: str, options: argparse.Namespace, device: torch.device) -> Any:
    """
    Load a model, a CLLM or an adapter.

    Args:
        name (`str`): folder or Hub id.
        options (`argparse.Namespace`): with `dtype`.
        device (`torch.device`): where to put it.

    Returns:
        `transformers.PreTrainedModel` or `peft.PeftModel`, in evaluation mode.

    Raises:
        OSError: if there is no such model.
        ValueError: as `load_cllm`.
    """
    dtype = options.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    model: Any = load_cllm(name, dtype=dtype)
    return model.to(device)


def tokenize(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """
    Turn prompts into token ids, as they stand.

    Args:
        tokenizer (`transformers.PreTrainedTokenizerBase`): of the model.
        texts (`list[str]`): the prompts.

    Returns:
        `list[list[int]]`.

    Raises:
        ValueError: if a prompt has no tokens.
    """
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    empty = next((text for text, prompt in zip(texts, prompts) if not prompt), None)
    if empty is not None:
        raise ValueError(
            f"Every prompt must have at least one token, got none for {empty[:60]!r}. Leave that line out."
        )
    return prompts


def finish(report: dict[str, Any], text: str, options: argparse.Namespace) -> str:
    """
    Write the files that are asked for.

    Args:
        report (`dict`): what was measured, ready for JSON.
        text (`str`): the same as Markdown.
        options (`argparse.Namespace`): with `json`, `markdown` and the `command_line`.

    Returns:
        `str`: the text.

    Raises:
        OSError: if a file cannot be written.
    """
    record = {"schema_version": SCHEMA_VERSION, "command": options.command_line, "options": _plain(options), **report}
    if options.json is not None:
        write_whole(options.json, json.dumps(record) + "\n")
    if options.markdown is not None:
        command = indent(options.command_line, "    ", lambda line: True)  # what was quoted in it may have several
        write_whole(options.markdown, f"{command}\n\n{text}\n")
    return text


def _plain(options: argparse.Namespace) -> dict[str, Any]:
    values = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    return {name: value for name, value in values.items() if not callable(value)}
