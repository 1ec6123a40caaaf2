"""From the options of `examples/benchmark.py heads` to trained heads, or to a table that compares them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from cllm_hf._host import count_embeddings
from cllm_hf.evaluation.arguments import add_common
from cllm_hf.evaluation.command import finish, load_model, prepare, tokenize
from cllm_hf.parsing import num_candidates, positive
from cllm_hf.trajectories.sources import read_prompts

from .heads import EAGLE, MEDUSA, check_output, load_heads, make_heads, save_heads
from .heads_comparison import Contestants, compare_heads, format_heads
from .heads_training import HeadsSetting, read_prompt_ids, read_records, train_heads


_NUM_HEADS = 4


def add_heads(kinds: Any) -> None:
    """
    Add `heads train` and `heads compare` to the kinds of benchmarks.

    Args:
        kinds: what `add_subparsers` gives.
    """
    heads = kinds.add_parser("heads", help="train Medusa heads or one like EAGLE's, and compare them")
    actions = heads.add_subparsers(dest="action", required=True, metavar="action")
    formatter = argparse.ArgumentDefaultsHelpFormatter
    train = actions.add_parser("train", help="train heads on responses of the model", formatter_class=formatter)
    train.add_argument("--kind", dest="heads", choices=(MEDUSA, EAGLE), required=True, help="which heads")
    train.add_argument("--model", required=True, help="folder or Hub id of the model, which stays as it is")
    train.add_argument(
        "--dataset",
        type=Path,
        required=True,
        help="file of JSON lines with `prompt_ids` and `response_ids`, or a dataset of trajectories",
    )
    train.add_argument("--output-dir", type=Path, required=True, help="folder for the heads")
    train.add_argument("--max-seconds", type=positive, help="how long to train")
    train.add_argument("--max-steps", type=positive, help="optimizer steps at most")
    train.add_argument("--batch-size", type=positive, default=8, help="records of an optimizer step")
    train.add_argument("--learning-rate", type=float, help="1e-3 for medusa and 5e-4 for eagle if not given")
    train.add_argument("--max-length", type=positive, default=1024, help="tokens of a record; the rest is cut off")
    train.add_argument("--num-heads", type=positive, help=f"of medusa; {_NUM_HEADS} if not given")
    train.add_argument(
        "--own-projections",
        action="store_true",
        help="give each head of medusa a projection onto the vocabulary, as published; by default they share that of "
        "the model",
    )
    add_common(train)
    compare = actions.add_parser("compare", help="compare ways to decode", formatter_class=formatter)
    compare.add_argument("--model", required=True, help="folder or Hub id of the target model")
    compare.add_argument(
        "--prompts",
        type=Path,
        required=True,
        help="text file with a prompt a line, or JSON lines with `prompt`, `question` or `prompt_ids`",
    )
    compare.add_argument("--num-prompts", type=positive, default=16, help="how many prompts, the first ones")
    compare.add_argument("--chat", action="store_true", help="put prompts through the tokenizer's chat template")
    compare.add_argument("--medusa", type=Path, help="folder of Medusa heads")
    compare.add_argument("--eagle", type=Path, help="folder of a head like EAGLE's")
    compare.add_argument("--lossless", help="folder or Hub id of a lossless adapter for the model")
    compare.add_argument("--cllm", help="folder or Hub id of a CLLM that was trained from the model")
    compare.add_argument("--assistant", help="folder or Hub id of a draft model, for assisted decoding")
    compare.add_argument("--block-size", type=positive, default=8, help="tokens that a forward pass checks")
    compare.add_argument(
        "--candidates", type=num_candidates, nargs="+", default=[], help="numbers of further guesses, a row each"
    )
    compare.add_argument("--max-new-tokens", type=positive, default=128, help="longest response")
    compare.add_argument("--repeats", type=positive, default=1, help="timed rounds over the prompts")
    compare.add_argument("--compile", action="store_true", help="add rows with a compiled forward pass")
    add_common(compare)


def run_heads(options: argparse.Namespace) -> str:
    """
    Run `examples/benchmark.py heads`.

    Args:
        options (`argparse.Namespace`): its options, by their names, and the `command_line`.

    Returns:
        `str`: the result as Markdown.

    Raises:
        OSError: if a file cannot be read or written, or a model or heads cannot be loaded.
        ValueError: if options contradict each other, or models, heads, records or prompts do not fit.
    """
    return _train(options) if options.action == "train" else _compare(options)


def _train(options: argparse.Namespace) -> str:
    setting = HeadsSetting(
        options.max_seconds,
        options.max_steps,
        options.batch_size,
        options.learning_rate,
        options.max_length,
        options.seed,
    )
    if options.heads == EAGLE and (options.own_projections or options.num_heads is not None):
        raise ValueError("`--num-heads` and `--own-projections` are for medusa, got them for eagle. Drop them.")
    check_output(options.output_dir)
    device = prepare(options)
    model = load_model(options.model, options, device)
    records = read_records(options.dataset, count_embeddings(model))
    heads = make_heads(options.heads, model, options.num_heads or _NUM_HEADS, options.own_projections)
    training = train_heads(heads, model, records, setting, show_progress=sys.stderr.isatty())
    save_heads(heads, options.output_dir, model, training)
    losses = training["losses"]
    text = (
        f"{options.heads}: {sum(one.numel() for one in heads.parameters()):,} parameters, {training['steps']:,} "
        f"optimizer steps in {training['seconds']:.0f} seconds, loss {_mean(losses[:20]):.3f} at first and "
        f"{_mean(losses[-20:]):.3f} in the end. Saved in {options.output_dir}."
    )
    return finish({"kind": "heads", "training": training}, text, options)


def _compare(options: argparse.Namespace) -> str:
    device = prepare(options)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    prompts = read_prompt_ids(options.prompts, options.num_prompts)
    if prompts is None:
        prompts = tokenize(tokenizer, read_prompts(options.prompts, options.num_prompts), options.chat)
    model = load_model(options.model, options, device)
    folders = {MEDUSA: options.medusa, EAGLE: options.eagle}
    heads = {kind: load_heads(folder, model, kind) for kind, folder in folders.items() if folder is not None}
    named = {name: getattr(options, name) for name in ("lossless", "cllm", "assistant")}
    others = {name: None if value is None else load_model(value, options, device) for name, value in named.items()}
    report = compare_heads(
        Contestants(model, heads, **others),
        prompts,
        options.block_size,
        options.max_new_tokens,
        options.candidates,
        options.repeats,
        options.compile,
        tokenizer.pad_token_id or 0,
        show_progress=sys.stderr.isatty(),
    )
    return finish({**report, "name": options.model}, format_heads(report), options)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
