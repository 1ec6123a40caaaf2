"""The demo's steps: problems, target model, trajectories, CLLM and lossless adapter, measurement."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from ..evaluation.benchmark import DecodingResult
from ..files import check_writable, save_whole
from ..quiet import quiet_hosts
from ..trajectories.loading import load_trajectories
from .clock import Clock
from .measuring import accuracy, draw_block, measure, report_table
from .options import DemoOptions
from .problems import Problem, make_problems, make_tokenizer
from .training import (
    copy_model,
    make_builder,
    make_cllm_trainer,
    make_lossless_trainer,
    make_model,
    train_target,
)


# What is kept, in this order, and a file that each part always holds.
_PARTS = {
    "target": "config.json",
    "trajectories": "manifest.json",
    "cllm": "config.json",
    "lossless": "adapter_config.json",
}


@dataclass(frozen=True)
class DemoReport:
    """
    What the demo measured.

    Attributes:
        results (`list[DecodingResult]`): see `measuring.measure`.
        accuracies (`list[float]`): share of held-out problems that each solves, from 0 to 1.
        table (`str`): both as a table.
        trajectories (`str`): one block of the target model and the CLLM, state by state; empty without a CLLM.
        seconds (`dict[str, float]`): time of each step.
    """

    results: list[DecodingResult]
    accuracies: list[float]
    table: str
    trajectories: str
    seconds: dict[str, float]


def run_demo(
    options: DemoOptions, output_dir: Path | None = None, say: Callable[[str], None] = print, color: bool = True
) -> DemoReport:
    """
    Run all steps.

    Args:
        options (`DemoOptions`): sizes.
        output_dir (`pathlib.Path`, *optional*): where to keep `target`, `trajectories`, `cllm` and `lossless`; each
            appears there when it is complete. They take the place of those of an earlier run. By default nothing is
            kept.
        say (`Callable[[str], None]`): prints a line.
        color (`bool`): whether the picture of the trajectories may use colors.

    Returns:
        `DemoReport`.

    Raises:
        OSError: if `output_dir` is not writable.
        ValueError: if it holds something else under a name that the demo uses.
    """
    if output_dir is not None:
        check_writable(output_dir)
        _check_parts(output_dir)
    set_seed(options.seed)
    tokenizer = make_tokenizer()
    needed = options.num_held_out + options.num_trajectories + options.target_updates * options.target_batch_size
    problems = make_problems(needed, options.seed)
    held_out = problems[: options.num_held_out]
    say(f"{len(problems)} distinct problems, {len(held_out)} of them held out. One of them:")
    say(f"  {held_out[0].prompt}\n  {held_out[0].response}")
    steps = _Steps(options, output_dir, say, tokenizer)
    with quiet_hosts():
        target = steps.train_target(problems[options.num_held_out :])
        dataset = steps.collect(target, problems[options.num_held_out :])
        cllm = steps.train_cllm(target, dataset) if options.has_cllm else None
        lossless = steps.train_lossless(target, dataset) if options.has_lossless else None
        steps.begin("Decoding the held-out problems, one at a time, in turns")
        results = measure(target, cllm, lossless, tokenizer, held_out, options)
        steps.clock.lap("measurement")
    accuracies = [accuracy(result, tokenizer, held_out) for result in results]
    return DemoReport(
        results,
        accuracies,
        report_table(results, accuracies),
        "" if cllm is None else draw_block(target, cllm, tokenizer, held_out[:4], options, color),
        steps.clock.laps,
    )


class _Steps:
    """The steps that leave something: each says what it does, keeps what it has made, and takes its time."""

    def __init__(
        self,
        options: DemoOptions,
        output_dir: Path | None,
        say: Callable[[str], None],
        tokenizer: PreTrainedTokenizerBase,
    ):
        self.options, self.output_dir, self.say, self.tokenizer = options, output_dir, say, tokenizer
        self.clock = Clock()
        self._number, self._count = 0, 3 + options.has_cllm + options.has_lossless

    def begin(self, title: str) -> None:
        self._number += 1
        self.say(f"\n[{self._number}/{self._count}] {title}")

    def train_target(self, problems: list[Problem]) -> PreTrainedModel:
        target = make_model(self.tokenizer, self.options.hidden_size)
        self.begin(f"Training a target model of {target.num_parameters():,} parameters from scratch")
        train_target(target, self.tokenizer, problems, self.options)
        self._keep("target", lambda folder: _save(target, self.tokenizer, folder))
        if self.output_dir is not None:
            for name in list(_PARTS)[1:]:  # of an earlier run, whose target model is gone
                shutil.rmtree(self.output_dir / name, ignore_errors=True)
            # Trajectories and adapters say by whom they are.
            target.name_or_path = self.tokenizer.name_or_path = str(self.output_dir / "target")
        self.clock.lap("target model")
        return target

    def collect(self, target: PreTrainedModel, problems: list[Problem]) -> Dataset:
        self.begin("Collecting the Jacobi trajectories of its responses")
        builder = make_builder(target, self.tokenizer, self.options)
        prompts = [problem.prompt for problem in problems[: self.options.num_trajectories]]
        if self.output_dir is None:
            dataset: Any = builder.build(prompts)
        else:
            self._keep("trajectories", lambda folder: builder.collect(prompts, folder))
            dataset = load_trajectories(self.output_dir / "trajectories")
        self.clock.lap("trajectories")
        return dataset

    def train_cllm(self, target: PreTrainedModel, dataset: Dataset) -> PreTrainedModel:
        self.begin("Training the CLLM on them")
        cllm = copy_model(target, self.tokenizer, self.options)
        trainer = make_cllm_trainer(cllm, self.tokenizer, dataset, self.options)
        trainer.train()
        self._keep("cllm", lambda folder: trainer.save_model(str(folder)))
        self.clock.lap("CLLM")
        return cllm.eval()

    def train_lossless(self, target: PreTrainedModel, dataset: Dataset) -> Any:
        self.begin("Training an adapter that drafts for the target model, which stays as it is")
        model = copy_model(target, self.tokenizer, self.options)
        trainer = make_lossless_trainer(model, self.tokenizer, dataset, self.options)
        trainer.train()
        self._keep("lossless", lambda folder: trainer.save_model(str(folder)))
        self.clock.lap("lossless adapter")
        return trainer.model.eval()

    def _keep(self, name: str, save: Callable[[Path], object]) -> None:
        if self.output_dir is not None:
            save_whole(self.output_dir / name, save)


def _check_parts(output_dir: Path) -> None:
    """Refuse to replace a folder that no demo has made, which a common name such as `target` may well be."""
    for name, file in _PARTS.items():
        part = output_dir / name
        if part.exists() and not (part / file).is_file():
            raise ValueError(
                f"The demo would replace {str(part)!r}, which is not from an earlier demo. Choose another output "
                "folder."
            )


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
