"""From the options of `examples/benchmark.py` to a text and files: loads models and prompts, measures, writes."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Collection, Sequence
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer, GenerationConfig

from cllm_hf._host import base_model_of
from cllm_hf.cli import hide_host_warnings, run_safely
from cllm_hf.evaluation.arguments import SHAPE_NAMES, add_common, add_source
from cllm_hf.evaluation.command import check_source, finish, load_model, prepare, tokenize
from cllm_hf.evaluation.shapes import make_random_model, random_prompts
from cllm_hf.options import DEFAULT_BLOCK_SIZE
from cllm_hf.parsing import positive
from cllm_hf.process import quiet_hosts
from cllm_hf.trajectories.loading import load_trajectories
from cllm_hf.trajectories.schema import FEATURES, check_dataset
from cllm_hf.trajectories.sources import read_prompts

from .collection import compare_collection, format_collection
from .collectors import CollectionSetting
from .heads_command import add_heads, run_heads
from .number_tokenizer import make_number_tokenizer
from .overhead import format_overhead, measure_overhead, overhead_methods
from .sft_comparison import compare_with_sft, format_sft
from .training import compare_training, format_training
from .training_methods import TrainingSetting, random_trajectories


# Of the random trajectories of `train`.
_RANDOM_SIZES = {"prompt_length": 64, "response_length": 128, "block_size": 16}


def main(given: Sequence[str] | None = None) -> int:
    """
    Run one of the benchmarks.

    Args:
        given (`Sequence[str]`, *optional*): arguments; by default those of the process.

    Returns:
        `int`: exit status: 0, 1 for an error that is explained on stderr, 130 after Ctrl-C.
    """
    given = sys.argv[1:] if given is None else given
    parser = argparse.ArgumentParser(prog="benchmark.py", description=__doc__.partition(":")[0])
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="kind")
    _add_overhead(kinds)
    _add_collect(kinds)
    _add_train(kinds)
    _add_sft(kinds)
    add_heads(kinds)
    options = parser.parse_args(given)
    options.command_line = shlex.join(["python", "examples/benchmark.py", *given])
    return run_safely(lambda: _run(options), "benchmark.py")


def _run(options: argparse.Namespace) -> int:
    hide_host_warnings()
    with quiet_hosts(keep_bars=sys.stderr.isatty()):
        runs = {
            "overhead": run_overhead,
            "collect": run_collect,
            "train": run_train,
            "sft": run_sft,
            "heads": run_heads,
        }
        print(runs[options.kind](options))
    return 0


def _add_overhead(kinds: Any) -> None:
    overhead = kinds.add_parser(
        "overhead",
        help="compare an iteration of Jacobi decoding with the bare forward pass in it",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    overhead.add_argument("--model", help="folder or Hub id of a model, a CLLM or an adapter")
    overhead.add_argument(
        "--shape",
        choices=SHAPE_NAMES,
        nargs="+",
        help="models with random weights; 4m and 125m without --model",
    )
    overhead.add_argument("--block-sizes", type=positive, nargs="+", default=[1, 8, 16])
    overhead.add_argument("--iterations", type=positive, default=32, help="of a round")
    overhead.add_argument("--rounds", type=positive, default=5, help="turns of each method")
    overhead.add_argument(
        "--prompt-length", type=positive, default=64, help="random tokens before the first iteration"
    )
    overhead.add_argument("--compile", action="store_true", help="add rows with a compiled forward pass")
    add_common(overhead)


def _add_collect(kinds: Any) -> None:
    collect = kinds.add_parser(
        "collect",
        help="compare how fast trajectories are collected with the published procedure",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_source(collect, num_prompts=256)
    collect.add_argument(
        "--num-published", type=positive, default=4, help="how many of them for the published procedure, which is slow"
    )
    collect.add_argument("--block-size", type=positive, default=16, help="tokens of a block")
    collect.add_argument("--max-new-tokens", type=positive, default=128, help="longest response")
    collect.add_argument(
        "--response-lengths", type=positive, nargs="+", default=[], help="values of --max-new-tokens for a table"
    )
    collect.add_argument(
        "--block-sizes", type=positive, nargs="+", default=[], help="values of --block-size for a table"
    )
    collect.add_argument("--max-tokens-per-batch", type=positive, default=16384, help="of the builder")
    collect.add_argument("--rounds", type=positive, default=3, help="turns of each method")
    add_common(collect)


def _add_train(kinds: Any) -> None:
    train = kinds.add_parser(
        "train",
        help="compare how fast CLLMTrainer trains, and in how much memory, with the published procedure",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_training(train)
    train.add_argument("--states-per-block", type=positive, default=1, help="of an optimizer step of CLLMTrainer")


def _add_sft(kinds: Any) -> None:
    sft = kinds.add_parser(
        "sft",
        help="compare how fast CLLMTrainer trains with SFTTrainer over as many tokens",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_training(sft)
    sft.set_defaults(states_per_block=1)


def _add_training(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="folder or Hub id of a model")
    parser.add_argument("--trajectories", help="folder or Hub id of trajectories that were collected from it")
    parser.add_argument("--shape", choices=SHAPE_NAMES, help="a model with random weights and trajectories instead")
    parser.add_argument("--prompt-length", type=positive, help="longest prompt of a shape, 64 if not given")
    parser.add_argument("--response-length", type=positive, help="longest response of a shape, 128 if not given")
    parser.add_argument("--block-size", type=positive, help="tokens of a block without states, 16 if not given")
    parser.add_argument("--batch-size", type=positive, default=8, help="records of an optimizer step of CLLMTrainer")
    parser.add_argument(
        "--steps", type=positive, default=4, help="its optimizer steps in a round; all ways train on the same records"
    )
    parser.add_argument("--rounds", type=positive, default=3, help="turns of each way")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="in all ways")
    add_common(parser)


def run_overhead(options: argparse.Namespace) -> str:
    """
    Run `examples/benchmark.py overhead`.

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
    check_source(options)
    device = prepare(options)
    reports = []
    for name in options.shape or [options.model]:
        if options.model is None:
            model = make_random_model(name, options.seed, options.dtype, device)
        else:
            model = load_model(name, options, device)
            # Every iteration counts, also after the end of the text, and none of the model's own processors.
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
    Run `examples/benchmark.py collect`.

    Args:
        options (`argparse.Namespace`): its options, by their names, and the `command_line`.

    Returns:
        `str`: the result as Markdown.

    Raises:
        OSError: if a file cannot be read or written, or a model cannot be loaded.
        ValueError: if options contradict each other or prompts are not usable.
    """
    check_source(options)
    texts = [] if options.prompts is None else read_prompts(options.prompts, options.num_prompts)
    device = prepare(options)
    if options.model is None:
        model = make_random_model(options.shape, options.seed, options.dtype, device)
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
    Run `examples/benchmark.py train`.

    Args:
        options (`argparse.Namespace`): its options, by their names, and the `command_line`.

    Returns:
        `str`: the result as Markdown.

    Raises:
        OSError: if a file cannot be read or written, or a model or dataset cannot be loaded.
        ValueError: if options contradict each other, trajectories are not usable, or both ways differ in their losses.
    """
    setting = _training_setting(options)
    model, tokenizer, dataset = _load_training(options, setting.batch_size * setting.steps)
    report = compare_training(model, tokenizer, dataset, setting, show_progress=sys.stderr.isatty())
    return finish({**report, "name": options.model or options.shape}, format_training(report), options)


def run_sft(options: argparse.Namespace) -> str:
    """
    Run `examples/benchmark.py sft`.

    Args:
        options (`argparse.Namespace`): its options, by their names, and the `command_line`.

    Returns:
        `str`: the result as Markdown.

    Raises:
        OSError: if a file cannot be read or written, or a model or dataset cannot be loaded.
        ValueError: if options contradict each other, or trajectories are not usable.
    """
    setting = _training_setting(options)
    count = setting.batch_size * (setting.steps + 1)
    model, tokenizer, dataset = _load_training(options, count, ("prompt_length", "response_length"))
    records = dataset.select(range(min(count, len(dataset)))).to_list()
    block_size = options.block_size or DEFAULT_BLOCK_SIZE
    if "states" in dataset.column_names:
        block_size = check_dataset(dataset, options.block_size)
    report = compare_with_sft(model, tokenizer, records, block_size, setting, show_progress=sys.stderr.isatty())
    return finish({**report, "name": options.model or options.shape}, format_sft(report), options)


def _training_setting(options: argparse.Namespace) -> TrainingSetting:
    return TrainingSetting(
        options.batch_size,
        options.steps,
        options.rounds,
        options.states_per_block,
        options.gradient_checkpointing,
        options.seed,
    )


def _load_training(
    options: argparse.Namespace, count: int, of_shapes: Collection[str] = tuple(_RANDOM_SIZES)
) -> tuple[Any, Any, Dataset]:
    """
    The model, its tokenizer and what it is trained on; `count` records for a shape. Trajectories come without the
    sizes in `of_shapes`.
    """
    check_source(options)
    if (options.model is None) != (options.trajectories is None):
        raise ValueError(
            "A model comes with its trajectories, a shape makes its own, got "
            + ("`--trajectories` with `--shape`." if options.model is None else "`--model` without `--trajectories`.")
            + " Pass a folder that `cllm collect` has written, or a shape alone."
        )
    sizes = {name: getattr(options, name) for name in _RANDOM_SIZES if getattr(options, name) is not None}
    refused = [name for name in sizes if name in of_shapes]
    if options.model is not None and refused:
        names = ", ".join(f"`--{name.replace('_', '-')}`" for name in refused)
        raise ValueError(f"Trajectories have sizes of their own, got {names} with `--trajectories`. Drop that.")
    device = prepare(options)
    if options.model is not None:
        dataset = load_trajectories(options.trajectories)
        return load_model(options.model, options, device), AutoTokenizer.from_pretrained(options.model), dataset
    model = make_random_model(options.shape, options.seed, options.dtype, device)
    vocab_size = model.config.vocab_size
    tokenizer: Any = make_number_tokenizer(vocab_size)
    tokenizer.pad_token = "0"  # the trainer wants one; padding is masked everywhere
    records = random_trajectories(vocab_size, count, **{**_RANDOM_SIZES, **sizes}, seed=options.seed)
    return model, tokenizer, Dataset.from_list(records, features=FEATURES)
