"""A target model and its CLLM side by side: speed, quality and convergence of every way to decode, in one run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._host import base_model_of
from ..blocks.limits import check_room
from ..journal import Journal
from ..options import check_block_size
from ..trajectories.manifest import fingerprint_weights
from .agreement import agreement_notes, compare_texts
from .benchmark import (
    DecodingMethod,
    PeakMemory,
    benchmark_decoding,
    check_counts,
    decode_all,
    describe_method,
    leave_out_refused,
)
from .comparison import check_candidates, check_models, check_prompts
from .convergence import measure_sides
from .further import decode_further
from .judgements import Judgement
from .progress import Progress, Say
from .reporting import (
    collapse_notes,
    compile_notes,
    describe_environment,
    difference_notes,
    window_notes,
)
from .sides import (
    Run,
    Side,
    compare_responses,
    describe_ended,
    describe_model,
    list_methods,
    list_sides,
    make_row,
    raw_run,
    speedup_over,
)


Judge = Callable[[list[list[int]]], list[Judgement]]
_NUM_MEMORY_PROMPTS = 3


def compare_models(
    target: Any,
    cllm: Any,
    prompts: Sequence[list[int]],
    *,
    block_size: int,
    max_new_tokens: int,
    more_block_sizes: Sequence[int | str] = (),
    candidates: Sequence[int] = (),
    judge: Judge | None = None,
    more_prompts: Sequence[list[int]] = (),
    assistant: Any = None,
    is_compiled: bool = False,
    batch_size: int | None = None,
    repeats: int = 1,
    pad_token_id: int = 0,
    show_progress: bool = True,
    say: Say | None = None,
    on_result: Callable[[dict[str, Any]], None] | None = None,
    keep_in: Path | None = None,
) -> dict[str, Any]:
    """
    Measure every way to decode with a target model and its CLLM, on the same prompts, in one run.

    The target model decodes by `generate()`, prompt lookup, assisted decoding if there is an `assistant`, and Jacobi;
    the CLLM by `generate()` and Jacobi. A lossless adapter in place of the CLLM decodes lossless, and by `generate()`
    where its base model is not the target model, weight for weight. All take turns on `prompts`, one at a time, which
    gives speed. How blocks converge is measured on up to 128 of these prompts, peak memory on three (on CUDA on all),
    both apart from the clocks. Accuracy is that of a method's own timed responses and of its model's greedy responses
    to `more_prompts`, decoded in batches without compiling anything.

    Args:
        target (`transformers.PreTrainedModel` or `peft.PeftModel`): the target model.
        cllm (`transformers.PreTrainedModel` or `peft.PeftModel`): the CLLM, with weights of its own; or a lossless
            adapter, on a base model of its own.
        prompts (`Sequence[list[int]]`): token ids of each prompt that is timed.
        block_size (`int`): tokens of a block.
        max_new_tokens (`int`): longest response.
        more_block_sizes (`Sequence[int | str]`): further values of `jacobi_block_size`, `"auto"` too, for rows of
            both models.
        candidates (`Sequence[int]`): values of `jacobi_candidates`, each for a further row beside every row by Jacobi.
            A model that refuses them has no such rows, and a note says why.
        judge (`Callable[[list[list[int]]], list[Judgement]]`, *optional*): says of each response to
            `[*prompts, *more_prompts]`, in that order, whether it is right. It gets token ids with the stop token, if
            the response has one, and is called once for each distinct list of responses.
        more_prompts (`Sequence[list[int]]`): prompts whose responses are judged too, but not timed.
        assistant (`transformers.PreTrainedModel`, *optional*): draft model of assisted decoding.
        is_compiled (`bool`): whether to have `generate()` and Jacobi with a compiled forward pass too.
        batch_size (`int`, *optional*): of `more_prompts`; by default as many are decoded together as fit the memory.
        repeats (`int`): timed rounds over `prompts`.
        pad_token_id (`int`): what pads prompts and blocks; it is masked.
        show_progress (`bool`): whether to draw progress bars.
        say (`Callable[[str], None]`, *optional*): gets lines on what is measured so far, and without bars on
            how far it is and about how long the rest takes.
        on_result (`Callable[[dict], None]`, *optional*): gets each of the `rows` of the result when it is done.
        keep_in (`pathlib.Path`, *optional*): folder in which finished parts are kept, so that the same call goes on
            after an interruption: a prompt that all methods have decoded in turn, a group of responses to judge, the
            memory of a method. What was measured with other models, options, versions or on another machine is
            measured anew. Whoever calls removes it.

    Returns:
        `dict`: everything that was measured, ready for JSON; `format_models` makes a text of it, `plot_models` a
        picture.

    Raises:
        ValueError: if there are no prompts, an empty one, or one with a token that the models do not have, a number is
            below 1, `candidates` has something else than integers of at least 0, vocabularies differ, models share
            weights, the judge gives another number of judgements, or a model refuses another option.
    """
    check_block_size(block_size, "block_size")
    for size in more_block_sizes:
        check_block_size(size, "more_block_sizes", allows_auto=True)
    check_candidates(candidates)
    check_counts(max_new_tokens=max_new_tokens, batch_size=1 if batch_size is None else batch_size, repeats=repeats)
    check_models(target, cllm, assistant)
    check_prompts(prompts, more_prompts, target)
    check_room(base_model_of(target), max(map(len, [*prompts, *more_prompts]), default=0), max_new_tokens)
    named = {"target": target, "cllm": cllm, "assistant": assistant}
    named = {name: model for name, model in named.items() if model is not None}
    settings = {
        "block_size": block_size,
        "max_new_tokens": max_new_tokens,
        "repeats": repeats,
        "num_prompts": len(prompts),
        "num_more_prompts": len(more_prompts),
        "batch_size": batch_size,
    }
    journal = Journal() if keep_in is None else Journal(keep_in, _describe_work(named, settings, pad_token_id))
    sides = list_sides(target, cllm)
    ways: dict[str, Any] = {"assistant": assistant, "is_compiled": is_compiled, "candidates": candidates}
    methods = {side.name: list_methods(side, [block_size, *more_block_sizes], **ways) for side in sides}
    work = _Work(sides, prompts, more_prompts, settings, pad_token_id, journal, Progress(show_progress, say))
    with _evaluation_mode(*named.values()):
        runs, notes = work.time(methods)
        own = _find_baselines(sides, runs)
        work.say_speeds(runs, own["target"])
        work.decode_further(own)
        _judge_all(runs, judge)
        rows = work.finish(runs, own, on_result)
        convergence, unmeasured = work.measure_convergence(own)
    compared = compare_responses(own["target"], _find_second(sides[1], runs), max_new_tokens)
    described = {name: describe_model(model) for name, model in named.items()}
    return {
        "kind": "models",
        "environment": describe_environment(target),
        "models": described,
        "titles": {side.name: side.title for side in sides},
        "settings": settings,
        "notes": [
            *difference_notes(described, sides[1].title),
            *window_notes(
                {side.title: side.model for side in sides}, max(map(len, [*prompts, *more_prompts])), max_new_tokens
            ),
            *_say_what_is_shared(sides[1]),
            *unmeasured,
            *agreement_notes(rows),
            *compile_notes([run.method for run in runs]),
            *notes,
            *collapse_notes(compared, max_new_tokens, describe_ended(runs, max_new_tokens)),
        ],
        "prompt_lengths": [len(prompt) for prompt in prompts],
        "rows": rows,
        "convergence": convergence,
        "comparison": compared,
        "methods": [raw_run(run) for run in runs],
    }


def _describe_work(models: dict[str, Any], settings: dict[str, Any], pad_token_id: int) -> dict[str, Any]:
    """What all parts of an evaluation depend on, as JSON has it."""
    described = {
        name: [fingerprint_weights(base_model_of(model)), base_model_of(model).generation_config.to_diff_dict()]
        for name, model in models.items()
    }
    work = {
        "environment": describe_environment(models["target"]),
        "models": described,
        "max_new_tokens": settings["max_new_tokens"],
        "pad_token_id": pad_token_id,
    }
    return dict(json.loads(json.dumps(work, default=str)))


def _find_baselines(sides: Sequence[Side], runs: Sequence[Run]) -> dict[str, Run]:
    """The `generate()` of each model, its first method; for an adapter that drafts for the target, the target's."""
    target = next(run for run in runs if run.side.name == "target")
    return {
        side.name: target if side.drafts_for_target else next(run for run in runs if run.side is side)
        for side in sides
    }


def _find_second(side: Side, runs: Sequence[Run]) -> Run:
    """Whose responses stand for the second model: those by its first method."""
    return next(run for run in runs if run.side is side)


def _say_what_is_shared(side: Side) -> list[str]:
    if not side.drafts_for_target:
        return []
    return [
        f"The {side.title} drafts for the target model itself, weight for weight. Its generate() and its responses "
        "to prompts that are not timed are the target model's, and were not decoded again."
    ]


# What is measured


@dataclass
class _Work:
    """What one evaluation decodes, and how it is kept and told."""

    sides: Sequence[Side]
    prompts: Sequence[list[int]]
    more_prompts: Sequence[list[int]]
    settings: dict[str, Any]
    pad_token_id: int
    journal: Journal
    progress: Progress

    def time(self, methods: dict[str, list[DecodingMethod]]) -> tuple[list[Run], list[str]]:
        """Decode the timed prompts in all ways that the models take, and say which they do not."""
        known, notes = [], []
        max_new_tokens = self.settings["max_new_tokens"]
        for side in self.sides:
            taken, refusal = leave_out_refused(methods[side.name], self.prompts, max_new_tokens, self.pad_token_id)
            if refusal is not None:
                notes.append(f"Candidates are left out for the {side.title}: {refusal}")
            known += [(side, method) for method in taken]
        results = benchmark_decoding(
            [method for _, method in known],
            self.prompts,
            max_new_tokens,
            repeats=self.settings["repeats"],
            pad_token_id=self.pad_token_id,
            journal=self.journal,
            progress=self.progress,
        )
        num_kept = results[0].num_kept_turns
        if num_kept:
            notes.append(
                f"{num_kept} of {len(results[0].seconds)} turns, of all methods, were timed before an interruption: "
                "speed-ups are ratios within a turn, and tokens/s are medians over both runs."
            )
        return [Run(side, method, result) for (side, method), result in zip(known, results)], notes

    def say_speeds(self, runs: Sequence[Run], target: Run) -> None:
        """What is known before the other responses are decoded."""
        for run in runs:
            speedup = speedup_over(run.result, target.result)
            over = "" if speedup is None else f", {speedup:.2f}x over target's generate()"
            self.progress.say(f"{run.result.name}: {run.result.tokens_per_second:.1f} tokens/s{over}")

    def decode_further(self, own: dict[str, Run]) -> None:
        """Responses of both models to the prompts that are not timed."""
        for side in self.sides:
            if side.drafts_for_target:
                side.more = own["target"].side.more
                continue
            side.more = decode_further(
                side.name,
                own[side.name].method,
                self.more_prompts,
                self.settings["max_new_tokens"],
                self.pad_token_id,
                self.settings["batch_size"],
                self.journal,
                self.progress,
            )

    def finish(
        self, runs: Sequence[Run], own: dict[str, Run], on_result: Callable[[dict[str, Any]], None] | None
    ) -> list[dict[str, Any]]:
        """Measure the memory of each method, compare its texts, and make its row."""
        rows = []
        with self.progress.stage("Measuring memory, comparing texts", len(runs), "ways to decode") as stage:
            for number, run in enumerate(runs):
                run.peak_memory = self._measure_memory(number, run)
                baseline = own[run.side.name]
                agreement = compare_texts(run.method, self.prompts, run.result, baseline.result)
                rows.append({**make_row(run, own["target"], baseline), **agreement})
                stage.advance()
                if on_result is not None:
                    on_result(rows[-1])
        return rows

    def _measure_memory(self, number: int, run: Run) -> int | None:
        """
        Off the clock, on the prompts with the longest texts; on CUDA the timed runs have told it. What compiled code
        holds is not known.
        """
        if run.method.is_compiled or run.result.extra_memory is not None:
            return None if run.method.is_compiled else run.result.extra_memory
        lengths = [len(prompt) + len(response) for prompt, response in zip(self.prompts, run.result.responses)]
        longest = sorted(range(len(lengths)), key=lambda index: -lengths[index])[:_NUM_MEMORY_PROMPTS]
        chosen = [self.prompts[index] for index in longest]

        def measure() -> int | None:
            with PeakMemory(run.method.model.device) as memory:
                decode_all(run.method, chosen, self.settings["max_new_tokens"], 1, self.pad_token_id, False)
            return memory.num_bytes

        found: int | None = self.journal.once(f"memory-{number:05d}", [describe_method(run.method), chosen], measure)
        return found

    def measure_convergence(self, own: dict[str, Run]) -> tuple[dict[str, Any], list[str]]:
        """How the blocks of both models converge, and why not."""
        owners = [(side, own[side.name]) for side in self.sides]
        with self.progress.stage("Measuring how blocks converge", len(owners), "models") as stage:
            found = measure_sides(owners, self.prompts, self.settings["block_size"], self.pad_token_id, self.journal)
            stage.advance(len(owners))
        return found


@contextmanager
def _evaluation_mode(*models: Any) -> Iterator[None]:
    """Some parts of a model may have been in another mode than others; all get theirs back."""
    modes = [(module, module.training) for model in models if model is not None for module in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, was_training in modes:
            module.training = was_training


def _judge_all(runs: list[Run], judge: Judge | None) -> None:
    if judge is None:
        return
    known: dict[tuple[tuple[int, ...], ...], list[Judgement]] = {}
    for run in runs:
        responses = run.responses
        key = tuple(map(tuple, responses))
        if key not in known:
            known[key] = list(judge([list(response) for response in responses]))
            if len(known[key]) != len(responses):
                raise ValueError(
                    f"`judge` must give one judgement for each of the {len(responses)} responses that it gets, got "
                    f"{len(known[key])}. Return them in the order of the responses, wrong ones too."
                )
        run.judgements = known[key]
