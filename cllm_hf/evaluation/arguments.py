"""The options of `cllm benchmark`. Nothing heavy is imported here."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..parsing import HelpFormatter, block_size, natural, num_candidates, positive


SHAPE_NAMES = ("4m", "30m", "125m", "0.5b")
# Of version 0.1, in the repository beside the package now.
MOVED = ("overhead", "collect", "train")


def add_benchmark_commands(commands: Any, run: Callable[[argparse.Namespace], int]) -> None:
    """Add `benchmark decode` and `models` to the commands of a parser; `run` runs both, and `kind` says which."""
    benchmark = commands.add_parser("benchmark", help="measure how fast models decode, and how well")
    kinds = benchmark.add_subparsers(dest="kind", required=True, metavar="kind")
    _add_decode(kinds)
    _add_models(kinds)
    for kind in kinds.choices.values():
        kind.set_defaults(run=run)
    for name in MOVED:
        kinds.add_parser(name, add_help=False).set_defaults(run=_refuse_moved)


def _refuse_moved(parsed: argparse.Namespace) -> int:
    raise ValueError(
        f"`cllm benchmark {parsed.kind}` has moved out of the package. Run `python examples/benchmark.py "
        f"{parsed.kind}` with the same options, in the repository."
    )


def _add_decode(kinds: Any) -> None:
    decode = kinds.add_parser(
        "decode",
        help="compare generate(), prompt lookup, assisted and Jacobi decoding on the same prompts",
        formatter_class=HelpFormatter,
    )
    add_source(decode, num_prompts=16)
    decode.add_argument(
        "--block-sizes",
        type=block_size,
        nargs="+",
        default=[4, 8, 16, 32, "auto"],
        help="block sizes to compare, numbers or auto",
    )
    decode.add_argument("--batch-size", type=positive, default=1, help="prompts that are decoded together")
    _add_decoding(decode)
    add_common(decode)


def _add_models(kinds: Any) -> None:
    models = kinds.add_parser(
        "models",
        help="compare a target model and its CLLM: speed, accuracy and convergence of every way to decode",
        formatter_class=HelpFormatter,
    )
    models.add_argument("--target", required=True, help="folder or Hub id of the target model")
    models.add_argument("--model", required=True, help="folder or Hub id of the CLLM, whole or an adapter")
    models.add_argument(
        "--prompts",
        type=Path,
        required=True,
        help="file with a prompt a line, as text or JSON (`prompt`, `question`); with `answer` or `response` for "
        "accuracy",
    )
    models.add_argument(
        "--num-prompts", type=positive, default=64, help="how many prompts, the first ones of the file"
    )
    models.add_argument(
        "--num-more-prompts", type=natural, default=0, help="how many prompts after these are judged, but not timed"
    )
    models.add_argument("--block-size", type=positive, default=16, help="tokens of a block")
    models.add_argument(
        "--more-block-sizes",
        type=block_size,
        nargs="+",
        default=[],
        help="further block sizes, numbers or auto: a row each for both models",
    )
    models.add_argument(
        "--batch-size", type=positive, help="batch size for the prompts that are not timed; by default what fits"
    )
    _add_decoding(models)
    add_common(models)
    models.add_argument(
        "--output-dir", type=Path, help="folder for report.json, report.md and report.png; an interrupted run goes on"
    )
    models.add_argument("--plot", type=Path, help="PNG file for accuracy over speed, or speed alone")


def _add_decoding(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--candidates",
        type=num_candidates,
        nargs="+",
        default=[],
        metavar="K",
        help="values of jacobi_candidates: each adds a row beside every row of Jacobi decoding",
    )
    parser.add_argument(
        "--chat", action="store_true", help="put prompts through the tokenizer's chat template, as messages of a user"
    )
    parser.add_argument("--assistant", help="folder or Hub id of a draft model, for assisted decoding")
    parser.add_argument("--max-new-tokens", type=positive, default=128, help="longest response")
    parser.add_argument("--repeats", type=positive, default=1, help="timed rounds over the prompts")
    parser.add_argument("--compile", action="store_true", help="add rows with a compiled forward pass")


def add_source(parser: argparse.ArgumentParser, num_prompts: int) -> None:
    """Add what is measured, a model with its prompts or a shape, to the parser of a kind of benchmark."""
    parser.add_argument("--model", help="folder or Hub id of a model, a CLLM or an adapter")
    parser.add_argument(
        "--shape", choices=SHAPE_NAMES, help="model with random weights, of this size, instead of --model"
    )
    parser.add_argument(
        "--prompts", type=Path, help="file with a prompt a line, as text or JSON (`prompt`, `question`)"
    )
    parser.add_argument("--prompt-length", type=positive, default=64, help="tokens of the random prompts of a shape")
    parser.add_argument(
        "--num-prompts", type=positive, default=num_prompts, help="how many prompts, the first ones of a file"
    )


def add_common(parser: argparse.ArgumentParser) -> None:
    """Add what all benchmarks have: weights, device and files."""
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="dtype of the weights; auto: that of the checkpoint, for shapes float32 on a CPU and bfloat16 elsewhere",
    )
    parser.add_argument("--device", default="auto", help="such as cpu or cuda:0; auto: cuda if there is one")
    parser.add_argument("--threads", type=positive, help="number of CPU threads of torch; by default torch chooses")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random")
    parser.add_argument("--json", type=Path, help="file for everything that was measured")
    parser.add_argument("--markdown", type=Path, help="file for the command and the table")
