"""From the options of `cllm benchmark` to a text and files: loads models and prompts, measures, writes."""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from textwrap import indent
from typing import Any

import torch
from tqdm.auto import tqdm

from ..files import check_writable_file, write_whole
from ..loading import load_cllm, load_tokenizer, pick_device
from ..names import Name
from ..process import quiet_hosts
from ..trajectories.prompts import read_rows
from ..trajectories.sources import as_chat, read_prompts, read_prompts_and_answers
from .comparison import check_assistant, compare_decoding, format_comparison, format_decode_row
from .judgements import Judgement
from .model_comparison import compare_models
from .model_report import format_model_row, format_models, plot_models
from .shapes import make_random_model, random_prompts


_SCHEMA_VERSION = 1
_UNFINISHED = "unfinished"  # folder in the output folder, of what an interrupted run has finished


def run_benchmark(options: argparse.Namespace) -> str:
    """Run `cllm benchmark`, of any kind, whose options are in the namespace with the `command_line`; as Markdown."""
    with quiet_hosts(keep_bars=sys.stderr.isatty()):
        runs = {"decode": _run_decode, "models": _run_models}
        return runs[options.kind](options)


def _run_decode(options: argparse.Namespace) -> str:
    check_source(options)
    check_assistant(options.assistant, options.batch_size)
    texts = [] if options.prompts is None else read_prompts(options.prompts, options.num_prompts)
    device = prepare(options)
    assistant, pad_token_id = None, 0
    if options.model is None:
        model = make_random_model(options.shape, options.seed, options.dtype, device)
        prompts = random_prompts(model.config.vocab_size, options.num_prompts, options.prompt_length, options.seed)
    else:
        tokenizer = load_tokenizer(options.model)
        prompts = tokenize(tokenizer, texts, options.chat)
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
        say=_say,
        on_result=lambda row: _say(format_decode_row(row, len(prompts))),
    )
    return finish({**report, "name": options.model or options.shape}, format_comparison(report), options)


def _run_models(options: argparse.Namespace) -> str:
    _place_outputs(options)
    names = {name: getattr(options, name) for name in ("target", "model", "assistant")}
    _check_names(names)
    texts, answers = read_prompts_and_answers(options.prompts, options.num_prompts + options.num_more_prompts)
    device = prepare(options)
    tokenizer = load_tokenizer(options.target)
    _check_tokenizers(tokenizer, names)
    prompts = tokenize(tokenizer, texts, options.chat)
    unfinished = None if options.output_dir is None else options.output_dir / _UNFINISHED
    target, cllm, assistant = (None if name is None else load_model(name, options, device) for name in names.values())
    report = compare_models(
        target,
        cllm,
        prompts[: options.num_prompts],
        block_size=options.block_size,
        max_new_tokens=options.max_new_tokens,
        more_block_sizes=options.more_block_sizes,
        candidates=options.candidates,
        judge=None if answers is None else _make_equality_judge(tokenizer, answers),
        more_prompts=prompts[options.num_prompts :],
        assistant=assistant,
        is_compiled=options.compile,
        batch_size=options.batch_size,
        repeats=options.repeats,
        pad_token_id=tokenizer.pad_token_id or 0,
        show_progress=sys.stderr.isatty(),
        say=_say,
        on_result=lambda row: _say(format_model_row(row, min(options.num_prompts, len(prompts)))),
        keep_in=unfinished,
    )
    text = finish({**report, "name": options.model}, format_models(report), options)
    if options.plot is not None:
        plot_models(report, options.plot)
    if unfinished is not None:
        shutil.rmtree(unfinished, ignore_errors=True)
    return text


def _place_outputs(options: argparse.Namespace) -> None:
    """Give the files of an output folder their places in it, unless they are to be elsewhere."""
    if options.output_dir is not None:
        for option, name in (("json", "report.json"), ("markdown", "report.md"), ("plot", "report.png")):
            setattr(options, option, getattr(options, option) or options.output_dir / name)


def _say(line: str) -> None:
    """To the terminal or a log, beside the report itself; above a progress bar."""
    tqdm.write(line, file=sys.stderr)
    sys.stderr.flush()


def _make_equality_judge(tokenizer: Any, answers: Sequence[str]) -> Callable[[list[list[int]]], list[Judgement]]:
    """A judge for which a response is right if it is the answer, but for white space around it."""

    def judge(responses: list[list[int]]) -> list[Judgement]:
        texts = [str(tokenizer.decode(response, skip_special_tokens=True)) for response in responses]
        are_equal = [text.strip() == answer.strip() for text, answer in zip(texts, answers)]
        return [Judgement(is_equal, "equal" if is_equal else "different") for is_equal in are_equal]

    return judge


def _check_tokenizers(tokenizer: Any, names: dict[str, str | None]) -> None:
    """The token ids of one model are given to the others. A model saved without a tokenizer is believed."""
    vocabulary = tokenizer.get_vocab()
    for option in ("model", "assistant"):
        name = names[option]
        if name is None:
            continue
        try:
            other = load_tokenizer(name).get_vocab()
        except OSError:
            continue
        if other != vocabulary:
            raise ValueError(
                f"`--{option}` must have the tokenizer of `--target`, got {name!r}, whose tokens are others. Pass a "
                "model of the same family."
            )


# What the benchmarks of `examples/benchmarks` do as well


def check_source(options: argparse.Namespace) -> None:
    """Check that there is one thing to measure, a model with its prompts or a shape, and that names can be names."""
    if (options.model is None) == (options.shape is None):
        got = "neither" if options.model is None else "both"
        raise ValueError(f"Exactly one of `--model` and `--shape` says what to measure, got {got}.")
    given = {name: getattr(options, name) for name in ("model", "prompts", "assistant") if hasattr(options, name)}
    _check_names({name: value for name, value in given.items() if name != "prompts"})
    if options.model is not None and given.get("prompts", "") is None:
        raise ValueError("A model needs prompts, got `--model` without `--prompts`. Pass a file with a prompt a line.")
    if options.shape is not None and (
        getattr(options, "chat", False) or any(one is not None for one in given.values())
    ):
        raise ValueError(
            "A shape has random prompts and no assistant, got `--shape` with `--prompts`, `--assistant` or `--chat`. "
            "Drop them, or pass `--model`."
        )


def _check_names(names: dict[str, str | None]) -> None:
    for option, name in names.items():
        if name is not None:
            Name.find(name).check(f"--{option}", "model")


def prepare(options: argparse.Namespace) -> torch.device:
    """Check that the files that are asked for can be written, set the number of threads, and find the device."""
    named = {f"`--{name}`": getattr(options, name, None) for name in ("json", "markdown", "plot")}
    given = {name: path for name, path in named.items() if path is not None}
    for (first, path), (second, other) in itertools.combinations(given.items(), 2):
        if path == other:
            raise ValueError(f"{first} and {second} must be two files, got {str(path)!r} for both.")
    for path in given.values():
        check_writable_file(path)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    return pick_device(options.device)


def load_model(name: str, options: argparse.Namespace, device: torch.device) -> Any:
    """Load a model, a CLLM or an adapter, in evaluation mode."""
    model: Any = load_cllm(name, dtype=options.dtype)
    return model.to(device)


def tokenize(tokenizer: Any, prompts: list[Any], is_chat: bool = False) -> list[list[int]]:
    """Turn prompts into token ids, as they stand or, texts, as messages of a user."""
    if not prompts:
        return []
    rows = read_rows([as_chat(prompt) if is_chat else prompt for prompt in prompts], None, tokenizer)
    empty = next((prompt for prompt, row in zip(prompts, rows) if not row.prompt_ids), None)
    if empty is not None:
        raise ValueError(
            f"Every prompt must have at least one token, got none for {empty[:60]!r}. Leave that line out."
        )
    return [row.prompt_ids for row in rows]


def finish(report: dict[str, Any], text: str, options: argparse.Namespace) -> str:
    """Write what was measured to the files that are asked for, as JSON and as Markdown, and return the latter."""
    values = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    plain = {name: value for name, value in values.items() if not callable(value)}
    record = {"schema_version": _SCHEMA_VERSION, "command": options.command_line, "options": plain, **report}
    if options.json is not None:
        write_whole(options.json, json.dumps(record) + "\n")
    if options.markdown is not None:
        command = indent(options.command_line, "    ", lambda line: True)  # what was quoted in it may have several
        write_whole(options.markdown, f"{command}\n\n{text}\n")
    return text
