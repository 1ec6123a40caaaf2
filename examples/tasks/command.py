"""The command line of an example."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cllm_hf.cli import hide_host_warnings
from cllm_hf.process import Process

from .parts import STEPS
from .task import Task


def main(task: type[Task], default_config: str | Path, arguments: Sequence[str] | None = None) -> int:
    """
    Run steps of a task's pipeline.

    Args:
        task (`type[Task]`): the task.
        default_config (`str` or `pathlib.Path`): YAML file that is read without `--config`.
        arguments (`Sequence[str]`, *optional*): by default those of the process.

    Returns:
        `int`: exit status: 0, 1 for an error that is explained on stderr, 130 after Ctrl-C.
    """
    parsed = _make_parser(task, default_config).parse_args(arguments)
    hide_host_warnings()
    program = task.name
    given = {name: getattr(parsed, name) for name in _flags(task)}
    given = {name: value for name, value in given.items() if value is not None}
    try:
        from cllm_hf.process import show_notices

        from .models import leave_others
        from .options import read_options
        from .steps import Pipeline
    except KeyboardInterrupt:  # imports take seconds
        return 130
    try:
        with show_notices(Process.current().is_first):
            options = read_options(task, parsed.config, parsed.set, parsed.output_dir, given)
            Pipeline(options, _say, show_bars=sys.stderr.isatty()).run(parsed.step, parsed.overwrite)
            leave_others()
    except KeyboardInterrupt:
        if Process.current().is_first:
            without = "" if parsed.overwrite is None else " without `--overwrite`"
            print(f"\n{program}: interrupted; the same command{without} goes on where it was.", file=sys.stderr)
        return 130
    except (ImportError, OSError, ValueError) as error:  # the first for what a metric needs
        print(f"{program}: {error}", file=sys.stderr)
        return 1
    return 0


def _say(line: str) -> None:
    print(line, flush=True)


def _make_parser(task: type[Task], default_config: str | Path) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=f"{task.title}: train a target model, make it a CLLM, and measure both.", allow_abbrev=False
    )
    parser.add_argument("step", choices=[*STEPS, "all"], help="what to do; `all` does what is not complete yet")
    parser.add_argument("--config", type=Path, default=default_config, metavar="FILE", help="default: %(default)s")
    parser.add_argument("--output-dir", metavar="DIR", help="folder of the run; by default as the config says")
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="SECTION.OPTION=VALUE",
        help="options that win over the config, such as train.max_steps=10",
    )
    parser.add_argument("--overwrite", choices=STEPS, metavar="STEP", help="begin this step and those after it anew")
    for name, help in _flags(task).items():
        parser.add_argument(f"--{name.replace('_', '-')}", dest=name, metavar="VALUE", help=help)
    return parser


def _flags(task: type[Task]) -> dict[str, Any]:
    """Options of the task itself and what they mean; the seed is that of the run."""
    return {field.name: field.metadata.get("help") for field in dataclasses.fields(task) if field.name != "seed"}
