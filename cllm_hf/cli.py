"""The `cllm` command."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ._version import __version__
from .evaluation.arguments import MOVED, add_benchmark_commands
from .options import JACOBI, LOSSLESS
from .parsing import HelpFormatter, block_size, num_candidates, port, positive
from .trajectories.options import COLLECT_HELP, add_trajectory_commands, parse_collect


_HOSTS = r"(accelerate|datasets|evaluate|huggingface_hub|peft|torch|transformers|trl)(\.|$)"
# Commands whose options the parsers of the hosts read, which know both spellings where there are two.
_OF_HOSTS = ("serve", "collect", "train")
_COMPARE_HELP = "decode a prompt by generate() and by Jacobi side by side, in the terminal or on a web page"
_SERVE_HELP = "the OpenAI-compatible server of transformers, with Jacobi decoding"


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Run a command, by default that of the process, and return the exit status: 0, 1 for an error that is explained on
    stderr or transitions that do not hold, 130 after Ctrl-C.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _make_parser()
    given = arguments if arguments[:1] and arguments[0] in _OF_HOSTS else [_with_dashes(part) for part in arguments]
    parsed, others = parser.parse_known_args(given)
    parsed.command_line = shlex.join(["cllm", *arguments])
    if parsed.command in _OF_HOSTS:
        parsed.arguments = others  # are for the parsers of the hosts
    elif others and getattr(parsed, "kind", None) not in MOVED:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    if parsed.command != "serve":
        hide_host_warnings()
    return run_safely(lambda: parsed.run(parsed), "cllm")


def _with_dashes(argument: str) -> str:
    """`--output_dir` is as good as `--output-dir`, as in the hosts' commands."""
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else argument


def run_safely(run: Callable[[], int], name: str) -> int:
    """
    Call `run`, explain on stderr, after `name`, what goes wrong, and return the exit status: that of `run`, 1 for an
    error, 130 after Ctrl-C.
    """
    try:
        return run()
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted; nothing half-written is left.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # as of `| head`, which has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (OSError, ValueError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    except ImportError as error:  # of what an option needs
        reason = str(error).strip().partition("\n")[0]
        print(f"{name}: a package that this needs cannot be imported: {reason}", file=sys.stderr)
        return 1


def hide_host_warnings() -> None:
    """Hide what the host libraries warn of, such as deprecated names: it is for programmers, not for a terminal."""
    for category in (DeprecationWarning, FutureWarning, UserWarning):
        warnings.filterwarnings("ignore", category=category, module=_HOSTS)


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cllm", description="Consistency LLMs for Hugging Face transformers.")
    parser.add_argument("--version", action="version", version=f"cllm_hf {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    _add_demo(commands)
    _add_compare(commands)
    add_benchmark_commands(commands, run=_run_benchmark)
    collect = commands.add_parser("collect", help=COLLECT_HELP, add_help=False, allow_abbrev=False)
    collect.set_defaults(run=_run_collect)
    train = commands.add_parser(
        "train",
        help="train a CLLM, or a lossless adapter, on a dataset of trajectories",
        add_help=False,
        allow_abbrev=False,
    )
    train.set_defaults(run=_run_train)
    add_trajectory_commands(commands, inspect=_run_inspect, show=_run_show, verify=_run_verify, push=_run_push)
    _add_export(commands)
    serve = commands.add_parser("serve", help=_SERVE_HELP, add_help=False, allow_abbrev=False)
    serve.add_argument("--block-size", type=_block_size)
    for name in ("--max-new-tokens", "--max-block-size", "--max-cache-length"):
        serve.add_argument(name, type=int)
    serve.set_defaults(run=_run_serve)
    return parser


def _add_demo(commands: Any) -> None:
    demo = commands.add_parser(
        "demo",
        help="train a small model, make it a CLLM, train a lossless adapter on it, and measure both, in minutes",
        description="Train a small model on word problems, make it a CLLM, train a lossless adapter on it, and "
        "measure both. Needs no network; takes about three minutes on two CPU cores.",
        formatter_class=HelpFormatter,
    )
    demo.add_argument(
        "--seed", type=int, default=0, help="seed of the problems, the weights and the order of the data"
    )
    demo.add_argument(
        "--output-dir",
        type=Path,
        help="folder to keep the models and the trajectories in; by default they are not kept",
    )
    demo.add_argument(
        "--mode",
        choices=("both", "cllm", "lossless"),
        default="both",
        help="what to make of the small model: a CLLM, a lossless adapter, or both",
    )
    demo.add_argument("--no-color", action="store_true", help="mark wrong tokens with brackets instead of colors")
    demo.set_defaults(run=_run_demo)


def _add_compare(commands: Any) -> None:
    compare = commands.add_parser(
        "compare",
        help=_COMPARE_HELP,
        description=f"{_COMPARE_HELP[0].upper()}{_COMPARE_HELP[1:]}.",
        formatter_class=HelpFormatter,
    )
    compare.add_argument("--model", required=True, help="folder or Hub id of a model, a CLLM or an adapter")
    compare.add_argument("--target", help="another model for the side of generate(); by default the same one")
    compare.add_argument("--prompt", help="prompt to decode; with `--web` you enter it on the page")
    compare.add_argument(
        "--web", action="store_true", help="serve a web page (takes gradio: pip install 'cllm_hf[demo]')"
    )
    compare.add_argument(
        "--mode",
        choices=(JACOBI, LOSSLESS),
        help="how the other side decodes; by default lossless if the model has a lossless adapter, else jacobi",
    )
    compare.add_argument("--block-size", type=block_size, default="auto", help="tokens of a block, or `auto`")
    compare.add_argument("--candidates", type=num_candidates, default=0, help="further guesses in each forward pass")
    compare.add_argument("--max-new-tokens", type=positive, help="longest response; 160 by default")
    compare.add_argument(
        "--temperature", type=float, default=0.0, help="temperature of sampling; 0 is greedy decoding"
    )
    compare.add_argument("--no-chat", action="store_true", help="use the prompt as it is, without the chat template")
    compare.add_argument("--device", default="auto", help="such as cpu or cuda:0")
    compare.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="dtype of the weights; auto: that of the checkpoint",
    )
    compare.add_argument(
        "--host",
        default="127.0.0.1",
        help="address that the page is served at; by default this machine alone can open it",
    )
    compare.add_argument("--port", type=port, help="port of the page; by default the first free one from 7860 on")
    compare.set_defaults(run=_run_compare)


def _add_export(commands: Any) -> None:
    export = commands.add_parser(
        "export",
        help="put Jacobi decoding beside a saved model, for people who have not installed cllm_hf",
        description="Put a folder custom_generate beside a saved model: it then decodes by Jacobi for people who "
        "have transformers, but not cllm_hf.",
        formatter_class=HelpFormatter,
    )
    export.add_argument("folder", help="folder of a saved model or adapter, or its id on the Hub")
    export.add_argument(
        "--block-size",
        type=_block_size,
        help="default block size; without it, that of the model's generation_config.json",
    )
    export.add_argument(
        "--overwrite", action="store_true", help="replace a custom_generate that cllm_hf did not write"
    )
    export.add_argument("--revision", help="branch of the Hub repository")
    export.set_defaults(run=_run_export)


def _block_size(text: str) -> int | str:
    return int(text) if text.lstrip("-").isdigit() else text


def _run_demo(parsed: argparse.Namespace) -> int:
    print("Loading trl and datasets ...", flush=True)
    from .demo.run import DemoOptions, run_demo

    report = run_demo(DemoOptions(mode=parsed.mode, seed=parsed.seed), parsed.output_dir, color=not parsed.no_color)
    print(f"\n{report.table}\n")
    if report.trajectories:
        print("Right tokens are blue, wrong ones red. One line an iteration, from first draft to fixed point.\n")
        print(report.trajectories)
    laps = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in report.seconds.items())
    print(f"\n{sum(report.seconds.values()):.0f} s in all: {laps}.")
    if parsed.output_dir is not None:
        kept = ["target", "responses", "trajectories", *{"both": ["cllm", "lossless"]}.get(parsed.mode, [parsed.mode])]
        print(f"Kept in {parsed.output_dir}: {', '.join(kept)}.")
    return 0


def _run_compare(parsed: argparse.Namespace) -> int:
    from .show.compare import run_compare

    try:
        return _say(run_compare(parsed))
    except KeyboardInterrupt:
        return _say_interrupted("the page has been closed." if parsed.web else "interrupted.")


def _run_benchmark(parsed: argparse.Namespace) -> int:
    from .evaluation.command import run_benchmark

    try:
        return _say(run_benchmark(parsed))
    except KeyboardInterrupt:
        if getattr(parsed, "output_dir", None) is None:
            raise
        return _say_interrupted("interrupted; the same command goes on where it was.")


def _run_collect(parsed: argparse.Namespace) -> int:
    options = parse_collect(parsed.arguments)
    from .trajectories.command import run_collect

    try:
        return _say(run_collect(options))
    except KeyboardInterrupt:
        return _say_interrupted("interrupted; the same command continues where it was.")


def _run_train(parsed: argparse.Namespace) -> int:
    from .process import Process
    from .training.command import describe_interruption, parse_train, run_train

    options = parse_train(parsed.arguments)
    try:
        return _say(run_train(options))
    except KeyboardInterrupt:
        return _say_interrupted(describe_interruption(options.training) if Process.current().is_first else "")


def _run_inspect(parsed: argparse.Namespace) -> int:
    from .show.command import run_inspect

    return _say(run_inspect(parsed, _may_color(parsed)))


def _run_show(parsed: argparse.Namespace) -> int:
    from .show.command import run_show

    return _say(run_show(parsed, _may_color(parsed)))


def _may_color(parsed: argparse.Namespace) -> bool:
    return sys.stdout.isatty() and not parsed.no_color and not os.environ.get("NO_COLOR")


def _run_verify(parsed: argparse.Namespace) -> int:
    from .trajectories.command import run_verify

    text, all_hold = run_verify(parsed)
    _say(text)
    return 0 if all_hold else 1


def _run_push(parsed: argparse.Namespace) -> int:
    from .trajectories.command import run_push

    return _say(run_push(parsed))


def _say(text: str) -> int:
    if text:
        print(text, flush=True)
    return 0


def _say_interrupted(text: str) -> int:
    if text:
        print(f"\ncllm: {text}", file=sys.stderr)
    return 130


def _run_export(parsed: argparse.Namespace) -> int:
    from .export import export_custom_generate

    written = export_custom_generate(
        parsed.folder, block_size=parsed.block_size, overwrite=parsed.overwrite, revision=parsed.revision
    )
    return _say(f"Written: {written}\nThe model card says how to decode with it.")


def _run_serve(parsed: argparse.Namespace) -> int:
    from .serving import ServingLimits, serve

    if {"-h", "--help"} & set(parsed.arguments):
        print(f"cllm serve: {_SERVE_HELP}. It has the options of `transformers serve`, below, and\n")
        print("  --block-size N        decode by Jacobi with this block size, whatever the model's defaults are")
        print("  --max-new-tokens N    refuse requests for more tokens")
        print(
            "  --max-block-size N    refuse requests for larger blocks; with K candidates a block counts K + 1 times"
        )
        print("  --max-cache-length N  refuse requests with more tokens of prompt and response together\n")
    try:
        limits = ServingLimits(parsed.max_new_tokens, parsed.max_block_size, parsed.max_cache_length)
        serve(parsed.arguments, parsed.block_size, _report_model, limits)
    except ImportError as error:
        print(f"cllm: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("cllm: the server has been stopped.", file=sys.stderr)
        return 130
    return 0


def _report_model(model: Any) -> None:
    config: Any = getattr(model, "generation_config", None)
    if getattr(config, "decoding", None) == "lossless":
        how = f"losslessly: its adapter drafts, with block size {config.jacobi_block_size}"
    elif getattr(config, "decoding", None) == "jacobi":
        how = f"by Jacobi, with block size {config.jacobi_block_size}"
    elif "generate" in vars(model):
        how = "as the `custom_generate` of its repository says"
    else:
        how = "one token a forward pass: it has no Jacobi defaults, and no `--block-size` was given"
    print(f"cllm: {model.name_or_path} decodes {how}.", file=sys.stderr, flush=True)
