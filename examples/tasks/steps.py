"""The steps of a pipeline, in their order, each done once."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm.auto import tqdm
from transformers import AutoConfig

from cllm_hf.files import check_unicode, check_writable
from cllm_hf.loading import load_tokenizer
from cllm_hf.process import Process, quiet_hosts
from cllm_hf.trajectories.prompts import check_prompt
from cllm_hf.trajectories.shard import count_dropped

from .cllm import collect_trajectories, train_cllm
from .models import wait_for_all
from .options import Options
from .parts import PARTS, STEPS, Part, Records
from .report import evaluate_models, write_report
from .sft import find_tokenizer, train_by_sft
from .task import Problem, fingerprint_problems


class Pipeline:
    """
    Makes a target model, its trajectories, a CLLM and a report, in `output_dir`.

    A part that is complete is not made again. One that was interrupted goes on where it was.

    Args:
        options (`Options`): all options.
        say (`Callable[[str], None]`): prints a line; called in the first of several processes.
        show_bars (`bool`): whether to draw progress bars instead of lines.

    Raises:
        OSError: if the output folder is not writable.
    """

    def __init__(self, options: Options, say: Callable[[str], None], show_bars: bool = True):
        self.options = options
        self.folder = options.output_dir
        self.records = Records(self.folder)
        self.show_bars = show_bars
        self._say = say if Process.current().is_first else lambda line: None
        check_writable(self.folder)

    def run(self, step: str, overwrite: str | None = None) -> None:
        """
        Run a step, or all.

        Args:
            step (`str`): one of `STEPS`, or `"all"`.
            overwrite (`str`, *optional*): a step to begin anew; what those after it have made is removed too.

        Raises:
            OSError: if something cannot be read or written, or another run is at work in the folder.
            ValueError: if a step before it is not complete, or what is there was made with other options; or as the
                steps say.
        """
        if step in ("all", "evaluate"):
            self._try_metric()
            self._try_draft()
        with self._no_other_run():
            if overwrite is not None:
                self._check_overwrite(step, overwrite)
                wait_for_all()  # before anything changes
                if Process.current().is_first:
                    removed = self.records.discard(overwrite)
                    self._say(f"Removed: {', '.join(removed) or 'nothing, as there was nothing'}.")
                wait_for_all()
            for name in STEPS if step == "all" else (step,):
                self._check_inputs(name)
                with quiet_hosts():
                    getattr(self, f"_{name}")(f"[{STEPS.index(name) + 1}/{len(STEPS)}] {name}:")

    @contextmanager
    def _no_other_run(self) -> Iterator[None]:
        """Two runs in one folder would write over each other's checkpoints. A killed one leaves no lock."""
        if not Process.current().is_first:
            yield
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            held = FileLock(self.folder / ".lock").acquire(timeout=0)
        except Timeout:
            raise OSError(
                f"One run at a time may work in an output folder, and another one is at work in {str(self.folder)!r}. "
                "Wait for it, or choose another `--output-dir`."
            ) from None
        with held:
            yield

    @cached_property
    def train_problems(self) -> list[Problem]:
        """`list[Problem]`: of the training split."""
        return self._load("train")

    @cached_property
    def test_problems(self) -> list[Problem]:
        """`list[Problem]`: of the test split."""
        return self._load("test")

    def _try_metric(self) -> None:
        """What is wrong with the test problems, or misses for the metric, is said before the hours of the training."""
        task = self.options.task
        if task.has_metric and Process.current().is_first:
            task.judge([problem.response for problem in self.test_problems], self.test_problems)

    def _try_draft(self) -> None:
        """The same of a draft model that nothing is done with before."""
        names = [options.name for options in (self.options.model, self.options.draft) if options is not None]
        if len(names) < 2 or None in names:
            return
        model, draft = (AutoConfig.from_pretrained(str(name)).get_text_config().vocab_size for name in names)
        if model != draft:
            raise ValueError(
                f"`draft.name` must be a model with the {model} tokens of the target model, got {names[1]!r} with "
                f"{draft}. Choose another one, or drop the section."
            )

    def _check_overwrite(self, step: str, overwrite: str) -> None:
        """Nothing is removed where the run would end before it has begun."""
        if step != "all" and STEPS.index(overwrite) < STEPS.index(step):
            raise ValueError(
                f"The step `{step}` needs what `--overwrite {overwrite}` removes. Run the step `{overwrite}` with it, "
                "or `all`."
            )
        for part in self._parts():
            options = self._options_of(part)  # the data are read for it
            if STEPS.index(part.step) < STEPS.index(overwrite):
                self.records.is_complete(part, options)  # or has not been made with other ones

    def _load(self, split: str) -> list[Problem]:
        with quiet_hosts(keep_bars=self.show_bars):
            problems = self.options.task.load(split)
        if not problems:
            raise ValueError(f"The task {self.options.task.name!r} must have problems in its {split} split, got none.")
        for number, problem in enumerate(problems):
            check_prompt(problem.prompt, f"problem {number} of the {split} split")
            check_unicode(str(problem.response), f"the response to problem {number} of the {split} split")
        return problems

    @property
    def target(self) -> str:
        """`str`: folder or Hub id of the target model."""
        return str(self.options.model.name) if self.options.sft is None else str(self.folder / "target")

    @property
    def _trains_draft(self) -> bool:
        draft = self.options.draft
        return draft is not None and (draft.name is None or bool(draft.sft))

    def _parts(self) -> list[Part]:
        """What this pipeline makes, in order."""
        left_out = set() if self.options.sft is not None else {"target"}
        left_out |= set() if self._trains_draft else {"draft"}
        return [part for name, part in PARTS.items() if name not in left_out]

    def _options_of(self, part: Part) -> dict[str, Any]:
        """What a part depends on: its own section, and those of what it is made from."""
        sections = {
            "target": ("task", "model", "sft"),
            "draft": ("task", "model", "sft", "draft"),
            "trajectories": ("task", "model", "sft", "collect"),
            "cllm": ("task", "model", "sft", "collect", "train"),
            "report": ("task", "model", "sft", "draft", "collect", "train", "evaluate"),
        }[part.name]
        values = {"task.name": self.options.task.name, "training data": self._fingerprints["train"]}
        values |= self.options.dependencies["top"]
        for section in sections:
            found = self.options.dependencies[section]
            # The block size is an option of the top level.
            values |= {name if name == "block_size" else f"{section}.{name}": found[name] for name in found}
        if part.name == "report":
            values["test data"] = self._fingerprints["test"]
            metric = self.options.task.judged_by
            values |= {} if metric is None else {"task.judged_by": metric}
        return values

    @cached_property
    def _fingerprints(self) -> _Fingerprints:
        return _Fingerprints(self)

    def _check_inputs(self, step: str) -> None:
        for part in self._parts():
            if STEPS.index(part.step) >= STEPS.index(step):
                break
            if not self.records.is_complete(part, self._options_of(part)):
                raise ValueError(
                    f"The step `{step}` needs {part.name!r} in {str(self.folder)!r}, which is not complete. Run the "
                    f"step `{part.step}` first, or `all`."
                )

    def _make(
        self, part: Part, title: str, what: str, make: Callable[[Path, Path], str], is_alone: bool = False
    ) -> None:
        """
        Make a part unless it is complete.

        Args:
            part (`Part`): the part.
            title (`str`): number and name of the step.
            what (`str`): what is done, for a line before it.
            make (`Callable[[Path, Path], str]`): does it, given the output folder and one for checkpoints; says how
                it went.
            is_alone (`bool`): whether the other processes are not here.
        """
        wait = wait_for_all if not is_alone else lambda: None
        depends = self._options_of(part)
        place = self.folder / part.paths[0]
        is_complete = self.records.is_complete(part, depends)
        wait()  # before anything changes
        if is_complete:
            if Process.current().is_first:  # checkpoints stay if a process is killed just before it removes them
                shutil.rmtree(self.folder / part.checkpoints, ignore_errors=True)
            self._say(f"{title} {part.name} is complete: {place}")
            return
        self._say(f"{title} {what}")
        checkpoints = self.folder / part.checkpoints
        start, has_ended, outcome = time.perf_counter(), False, ""
        if Process.current().is_first:
            self.records.begin(part, depends)
        try:
            outcome = make(self.folder, checkpoints)
            has_ended = True
        finally:  # also at Ctrl-C
            if Process.current().is_first:
                self.records.end(part, depends, time.perf_counter() - start, is_complete=has_ended)
        if Process.current().is_first:
            shutil.rmtree(checkpoints, ignore_errors=True)
        wait()
        total = self.records.seconds(part) or 0.0
        self._say(f"      {outcome}{total:.0f} s: {place}")

    def _sft(self, title: str) -> None:
        options = self.options
        if options.sft is None:
            self._say(f"{title} left out, the target model is {self.target}")
        else:
            origin = options.model.name or f"a {options.model.architecture} from scratch"
            what = f"the target model, {origin}, on {len(self.train_problems)} answers"
            self._make(PARTS["target"], title, what, self._train_target)
        if self._trains_draft:
            self._make(PARTS["draft"], title, "a draft model for assisted decoding", self._train_draft)

    def _train_target(self, folder: Path, checkpoints: Path) -> str:
        tokenizer = find_tokenizer(self.options.model, self.train_problems, checkpoints)
        return self._train_one(self.options.model, tokenizer, folder / "target", checkpoints)

    def _train_draft(self, folder: Path, checkpoints: Path) -> str:
        draft: Any = self.options.draft
        return self._train_one(draft, load_tokenizer(self.target), folder / "draft", checkpoints)

    def _train_one(self, model: Any, tokenizer: Any, folder: Path, checkpoints: Path) -> str:
        used = train_by_sft(self.options, model, self.train_problems, tokenizer, folder, checkpoints, self.show_bars)
        dropped = len(self.train_problems) - used
        return f"{dropped} problems longer than `max_length` left out, " if dropped else ""

    def _collect(self, title: str) -> None:
        def make(folder: Path, checkpoints: Path) -> str:
            counts = collect_trajectories(
                self.options, self.target, self.train_problems, folder / "trajectories", self.show_bars
            )
            return f"{counts.get('kept', 0)} kept, {sum(count_dropped(counts).values())} dropped, "

        count = self.options.collect.num_prompts
        count = len(self.train_problems) if count is None else min(count, len(self.train_problems))
        what = "responses to" if self.options.responses_only else "trajectories of answers to"
        self._make(PARTS["trajectories"], title, f"the target model's {what} {count} problems", make)

    def _train(self, title: str) -> None:
        def make(folder: Path, checkpoints: Path) -> str:
            train_cllm(
                self.options,
                self.target,
                self.train_problems,
                folder / "trajectories",
                folder / "cllm",
                checkpoints,
                self.show_bars,
            )
            return ""

        is_lossless = bool(self.options.train.get("lossless"))
        what = "a lossless adapter for the target model" if is_lossless else "the CLLM, from the target model"
        self._make(PARTS["cllm"], title, what, make)

    def _evaluate(self, title: str) -> None:
        if not Process.current().is_first:  # the others end here: they would wait for longer than they may
            return
        tables: list[str] = []

        def make(folder: Path, checkpoints: Path) -> str:
            draft = None if self.options.draft is None else self.options.draft.name
            draft = str(folder / "draft") if self._trains_draft else draft
            comparison = evaluate_models(
                self.options,
                self.target,
                str(folder / "cllm"),
                draft,
                self.test_problems,
                self.show_bars,
                self._tell,
                checkpoints / "checkpoint-parts",
            )
            tables.append(write_report(folder, self.options.task.title, comparison, self._facts()))
            return ""

        count = min(self.options.evaluate.num_prompts, len(self.test_problems))
        what = f"both models on {count} of {len(self.test_problems)} test problems"
        self._make(PARTS["report"], title, what, make, is_alone=True)
        for table in tables:
            self._say(f"\n{table}")

    def _tell(self, line: str) -> None:
        """A line below that of the step, above a progress bar."""
        if self.show_bars:
            tqdm.write(f"      {line}", file=sys.stderr)
        else:
            self._say(f"      {line}")

    def _facts(self) -> dict[str, Any]:
        seconds: dict[str, float] = {}
        for part in self._parts():
            if part.step != "evaluate":
                seconds[part.step] = seconds.get(part.step, 0.0) + (self.records.seconds(part) or 0.0)
        return {"options": self._options_of(PARTS["report"]), "seconds": seconds}


class _Fingerprints:
    """Of the splits, each loaded when it is asked for."""

    def __init__(self, pipeline: Pipeline):
        self._pipeline = pipeline
        self._known: dict[str, str] = {}

    def __getitem__(self, split: str) -> str:
        if split not in self._known:
            problems = self._pipeline.train_problems if split == "train" else self._pipeline.test_problems
            self._known[split] = fingerprint_problems(problems)
        return self._known[split]
