"""The demo's steps: problems, target model, responses, CLLM and lossless adapter, measurement."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed

from ..cards import format_table
from ..evaluation.benchmark import DecodingMethod, DecodingResult, benchmark_decoding
from ..files import check_writable, save_whole
from ..process import quiet_hosts
from ..show.picture import token_decoder
from ..show.terminal import BlockTrajectory, format_blocks
from ..trajectories.builder import TrajectoryBuilder
from ..trajectories.loading import load_trajectories
from ..trajectories.options import KEEP_ALL
from .problems import Problem, make_problems, make_tokenizer, read_answer
from .training import DemoOptions, make_cllm_trainer, make_lossless_trainer, make_model, train_target


# What is kept, in this order, and a file that each part always holds.
_PARTS = {
    "target": "config.json",
    "responses": "manifest.json",
    "trajectories": "manifest.json",
    "cllm": "config.json",
    "lossless": "adapter_config.json",
}
# Parts of the whole time that the steps took on two CPU cores, for an estimate of what is left.
_SHARES = {"target model": 39, "responses": 6, "CLLM": 35, "lossless adapter": 8, "measurement": 12}
_FIRST_ESTIMATE = 20  # optimizer steps of the target model
_COLUMNS = ("method", "tokens/s", "tokens per forward pass", "speed-up over generate()", "accuracy")


@dataclass(frozen=True)
class DemoReport:
    """What the demo measured: of each way to decode a result and the share of held-out problems that it solves."""

    results: list[DecodingResult]
    accuracies: list[float]
    table: str  # of both
    trajectories: str  # one block of the target model and the CLLM, state by state; empty without a CLLM
    seconds: dict[str, float]  # of each step


def run_demo(
    options: DemoOptions, output_dir: Path | None = None, say: Callable[[str], None] = print, color: bool = True
) -> DemoReport:
    """
    Run all steps, and say with `say` what each does.

    With an `output_dir`, `target`, `responses`, `trajectories`, `cllm` and `lossless` are kept there, in place of
    those of an earlier run; each appears when it is complete. `color` is for the picture of the trajectories.
    """
    if output_dir is not None:
        check_writable(output_dir)
        _check_parts(output_dir)
    set_seed(options.seed)
    tokenizer = make_tokenizer()
    needed = options.num_held_out + max(options.num_responses, options.target_updates * options.target_batch_size)
    problems = make_problems(needed, options.seed, options.largest_number)
    held_out, problems = problems[: options.num_held_out], problems[options.num_held_out :]
    say(f"{needed} distinct problems, {len(held_out)} of them held out. One of them:")
    say(f"  {held_out[0].prompt}\n  {held_out[0].response}")
    steps = _Steps(options, output_dir, say, tokenizer)
    with quiet_hosts():
        target = steps.train_target(problems)
        dataset = steps.collect(target, problems)
        cllm = steps.train_cllm(target, dataset) if options.mode != "lossless" else None
        lossless = steps.train_lossless(target, dataset) if options.mode != "cllm" else None
        with steps.step("measurement", "Decoding the held-out problems, one at a time, in turns"):
            results = _measure(target, cllm, lossless, tokenizer, held_out, options)
    accuracies = [_accuracy(result, tokenizer, held_out) for result in results]
    drawn = "" if cllm is None else _draw_block(target, cllm, tokenizer, held_out[:4], options, color)
    return DemoReport(results, accuracies, _format_results(results, accuracies), drawn, steps.seconds)


@dataclass
class _Steps:
    """The steps that leave something: each says what it does, keeps what it has made, and takes its time."""

    options: DemoOptions
    output_dir: Path | None
    say: Callable[[str], None]
    tokenizer: PreTrainedTokenizerBase
    seconds: dict[str, float] = field(default_factory=dict)
    _start: float = field(default_factory=time.perf_counter)

    @contextmanager
    def step(self, name: str, title: str) -> Iterator[None]:
        steps = self._steps()
        left = "" if not self.seconds else f" (about {self._estimate(sum(self.seconds.values()), steps)} to go)"
        self.say(f"\n[{len(self.seconds) + 1}/{len(steps)}] {title}{left}")
        yield
        now = time.perf_counter()
        self.seconds[name] = now - self._start
        self._start = now

    def say_first(self, seconds_per_update: float, updates: int) -> None:
        """Say the first estimate: what is left of the target model's training, and the steps after it."""
        shares = [_SHARES[name] for name in self._steps()]
        whole = seconds_per_update * self.options.target_updates
        rest = seconds_per_update * updates + whole * sum(shares[1:]) / shares[0]
        self.say(f"\n  On this machine all steps take about {_minutes(rest)} more.")

    def _steps(self) -> list[str]:
        left_out = {"cllm": "lossless adapter", "lossless": "CLLM"}.get(self.options.mode)
        return [name for name in _SHARES if name != left_out]

    def _estimate(self, elapsed: float, steps: list[str]) -> str:
        """What is left, if the steps take their usual shares of the whole."""
        done = sum(_SHARES[name] for name in steps[: len(self.seconds)])
        return _minutes(elapsed * sum(_SHARES[name] for name in steps[len(self.seconds) :]) / done)

    def train_target(self, problems: list[Problem]) -> PreTrainedModel:
        target = make_model(self.tokenizer, self.options.hidden_size)
        size = f"{target.num_parameters():,}"
        with self.step("target model", f"Training a target model of {size} parameters from scratch"):
            train_target(target, self.tokenizer, problems, self.options, _FirstEstimate(self))
            self._keep("target", lambda folder: _save(target, self.tokenizer, folder))
            if self.output_dir is not None:
                for name in list(_PARTS)[1:]:  # of an earlier run, whose target model is gone
                    shutil.rmtree(self.output_dir / name, ignore_errors=True)
                # Trajectories and adapters say by whom they are.
                target.name_or_path = self.tokenizer.name_or_path = str(self.output_dir / "target")
        return target

    def collect(self, target: PreTrainedModel, problems: list[Problem]) -> Dataset:
        """Its responses, which both trainings read; and the trajectories of a few of them, to look at."""
        with self.step("responses", "Collecting its responses to other problems"):
            prompts = [problem.prompt for problem in problems[: self.options.num_responses]]
            builder = _make_builder(target, self.tokenizer, self.options, responses_only=True)
            if self.output_dir is None:
                return builder.build(prompts)
            self._keep("responses", lambda folder: builder.collect(prompts, folder))
            with_states = _make_builder(target, self.tokenizer, self.options)
            some = prompts[: self.options.num_trajectories]
            self._keep("trajectories", lambda folder: with_states.collect(some, folder))
            return load_trajectories(self.output_dir / "responses")

    def train_cllm(self, target: PreTrainedModel, dataset: Dataset) -> Any:
        with self.step("CLLM", "Training the CLLM on them, on states that it makes itself"):
            return self._train("cllm", make_cllm_trainer(target, self.tokenizer, dataset, self.options))

    def train_lossless(self, target: PreTrainedModel, dataset: Dataset) -> Any:
        title = "Training an adapter that drafts for the target model, which stays as it is"
        with self.step("lossless adapter", title):
            return self._train("lossless", make_lossless_trainer(target, self.tokenizer, dataset, self.options))

    def _train(self, part: str, trainer: Any) -> Any:
        trainer.train()
        self._keep(part, lambda folder: trainer.save_model(str(folder)))
        return trainer.model.eval()

    def _keep(self, name: str, save: Callable[[Path], object]) -> None:
        if self.output_dir is not None:
            save_whole(self.output_dir / name, save)


def _minutes(seconds: float) -> str:
    if seconds < 90:
        return f"{max(round(seconds / 10), 1) * 10} seconds"
    return f"{seconds / 60:.1f} minutes"


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


class _FirstEstimate(TrainerCallback):
    """Says early in the first step how long all of them will take."""

    def __init__(self, steps: _Steps):
        self._steps = steps
        self._start = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:  # which is slower than the others
            self._start = time.perf_counter()
        if state.global_step == _FIRST_ESTIMATE:
            self._steps.say_first(
                (time.perf_counter() - self._start) / (_FIRST_ESTIMATE - 1), state.max_steps - _FIRST_ESTIMATE
            )


def _make_builder(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    options: DemoOptions,
    show_progress: bool = True,
    responses_only: bool = False,
) -> TrajectoryBuilder:
    about_states: dict[str, Any] = {} if responses_only else {"block_size": options.block_size, "seed": options.seed}
    return TrajectoryBuilder(
        model,
        tokenizer,
        max_new_tokens=options.max_new_tokens,
        responses_only=responses_only,
        **about_states,
        # Whatever the target model says: if it was trained for too short, the demo shows that.
        cleaning=KEEP_ALL,
        show_progress=show_progress,
    )


def _measure(
    target: PreTrainedModel,
    cllm: PreTrainedModel | None,
    lossless: Any,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[Problem],
    options: DemoOptions,
) -> list[DecodingResult]:
    """Decode problems with all models that there are, in every way that makes sense."""
    greedy: dict[str, Any] = {"decoding": "autoregressive"}
    jacobi = {"decoding": "jacobi", "jacobi_block_size": options.block_size}
    drafting = {"decoding": "lossless", "jacobi_block_size": options.lossless_block_size}
    methods = [
        DecodingMethod(name, model, generate_options)
        for name, model, generate_options in (
            ("target model, generate()", target, greedy),
            ("target model, jacobi", target, jacobi),
            ("target model, lossless", lossless, drafting),
            ("CLLM, generate()", cllm, greedy),
            ("CLLM, jacobi", cllm, jacobi),
        )
        if model is not None
    ]
    prompts = [tokenizer(problem.prompt)["input_ids"] for problem in problems]
    return benchmark_decoding(methods, prompts, options.max_new_tokens)


def _accuracy(result: DecodingResult, tokenizer: PreTrainedTokenizerBase, problems: list[Problem]) -> float:
    answers = [read_answer(str(tokenizer.decode(ids, skip_special_tokens=True))) for ids in result.responses]
    return sum(answer == problem.answer for answer, problem in zip(answers, problems)) / len(problems)


def _format_results(results: list[DecodingResult], accuracies: list[float]) -> str:
    rows = [
        [
            result.name,
            f"{result.tokens_per_second:.0f}",
            f"{result.tokens_per_forward:.2f}",
            f"{result.speedup_over(results[0]):.2f}x",
            f"{100 * share:.1f}%",
        ]
        for result, share in zip(results, accuracies)
    ]
    return format_table(_COLUMNS, rows)


def _draw_block(
    target: PreTrainedModel,
    cllm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[Problem],
    options: DemoOptions,
    color: bool,
) -> str:
    """
    Draw how both models solve the second block of a response, from the same first draft.

    A trajectory that does not end in its response is not kept, so the first problem that both models keep is drawn.
    """
    prompts = [problem.prompt for problem in problems]
    records = []
    for model in (target, cllm):
        builder = _make_builder(model, tokenizer, options, show_progress=False)
        records.append({record["prompt"]: record for record in builder.build(prompts)})
    shown = next((prompt for prompt in prompts if all(prompt in kept for kept in records)), None)
    if shown is None:
        return ""
    blocks = []
    for name, kept in zip(("Target model", "CLLM"), records):
        last = len(kept[shown]["states"]) - 1
        blocks.append(BlockTrajectory.of(kept[shown], min(1, last), name))
    return format_blocks(blocks, token_decoder(tokenizer), color)
