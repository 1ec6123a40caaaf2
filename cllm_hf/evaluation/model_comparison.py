"""A target model and its CLLM side by side: speed, quality and convergence of every way to decode, in one run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from .._host import base_model_of
from ..blocks.drafter import find_drafter
from ..blocks.limits import check_packable
from ..options import check_block_size
from ..trajectories.collector import Request, collect_trajectories
from ..trajectories.options import DEFAULT_TOKENS_PER_BATCH
from ..trajectories.responding import batch_by_tokens
from ..trajectories.statistics import TrajectoryStatistics, measure_trajectories
from .agreement import agreement_notes, compare_texts
from .benchmark import (
    DecodingMethod,
    DecodingResult,
    PeakMemory,
    benchmark_decoding,
    check_counts,
    decode_all,
    leave_out_refused,
    make_methods,
)
from .comparison import check_candidates, check_models, check_prompts, raw_result
from .judgements import Judgement, compare_judgements, count_right
from .reporting import (
    collapse_notes,
    compile_notes,
    describe_environment,
    difference_notes,
    window_notes,
)


Judge = Callable[[list[list[int]]], list[Judgement]]
TITLES = {"target": "target model", "cllm": "CLLM"}
_LOSSLESS = "lossless adapter"  # in place of a CLLM
_NUM_MEMORY_PROMPTS = 3
_MOST_TRAJECTORIES = 128


@dataclass
class _Side:
    """One of the two models, and its responses to further prompts, which are decoded in batches."""

    name: str  # "target" or "cllm"
    title: str
    model: Any
    more: list[list[int]]


@dataclass
class _Run:
    """A way in which a model decodes, and all that is known of what it did."""

    side: _Side
    method: DecodingMethod
    result: DecodingResult
    judgements: list[Judgement] | None = None
    peak_memory: int | None = None

    @property
    def responses(self) -> list[list[int]]:
        """To all prompts."""
        return [*self.result.responses, *self.side.more]

    def is_cut_off(self, response: list[int], max_new_tokens: int) -> bool:
        """Whether `max_new_tokens` has ended a response, and no stop token."""
        return len(response) == max_new_tokens and response[-1] not in self.method.stop_ids


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
    batch_size: int = 32,
    repeats: int = 1,
    pad_token_id: int = 0,
    show_progress: bool = True,
) -> dict[str, Any]:
    """
    Measure every way to decode with a target model and its CLLM, on the same prompts, in one run.

    The target model decodes by `generate()`, prompt lookup, assisted decoding if there is an `assistant`, and Jacobi;
    the CLLM by `generate()` and Jacobi. A lossless adapter in place of the CLLM decodes by `generate()`, which is that
    of its base model, and lossless. All take turns on `prompts`, one at a time, which gives speed. How blocks converge
    is measured on up to 128 of these prompts, peak memory on three, both apart from the clocks. Accuracy is that of a
    method's own timed responses and of its model's greedy responses to `more_prompts`, decoded in batches.

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
        batch_size (`int`): of `more_prompts`.
        repeats (`int`): timed rounds over `prompts`.
        pad_token_id (`int`): what pads prompts and blocks; it is masked.
        show_progress (`bool`): whether to draw progress bars.

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
    check_counts(max_new_tokens=max_new_tokens, batch_size=batch_size, repeats=repeats)
    check_models(target, cllm, assistant)
    check_prompts(prompts, more_prompts, target)
    sides = _list_sides(target, cllm)
    ways: dict[str, Any] = {"assistant": assistant, "is_compiled": is_compiled, "candidates": candidates}
    methods = {side.name: _list_methods(side, [block_size, *more_block_sizes], **ways) for side in sides}
    with _evaluation_mode(target, cllm, assistant):
        runs, refusals = _decode(sides, methods, prompts, max_new_tokens, repeats, pad_token_id, show_progress)
        # The first of each model is `generate()`.
        own = {side.name: next(run for run in runs if run.side is side) for side in sides}
        for run in own.values():
            run.side.more = decode_all(
                run.method, more_prompts, max_new_tokens, batch_size, pad_token_id, show_progress
            )
        _judge_all(runs, judge)
        _measure_memory(runs, prompts, max_new_tokens, pad_token_id)
        convergence, notes = _measure_sides(list(own.values()), prompts, block_size, pad_token_id)
        rows = [
            {
                **_row(run, own["target"], own[run.side.name]),
                **compare_texts(run.method, prompts, run.result, own[run.side.name].result),
            }
            for run in runs
        ]
        notes += agreement_notes(rows)
    named = {"target": target, "cllm": cllm, "assistant": assistant}
    described = {name: _describe(model) for name, model in named.items() if model is not None}
    compared = _compare_responses(own["target"], own["cllm"], max_new_tokens)
    return {
        "kind": "models",
        "environment": describe_environment(target),
        "models": described,
        "titles": {side.name: side.title for side in sides},
        "settings": {
            "block_size": block_size,
            "max_new_tokens": max_new_tokens,
            "repeats": repeats,
            "num_prompts": len(prompts),
            "num_more_prompts": len(more_prompts),
            "batch_size": batch_size,
        },
        "notes": [
            *difference_notes(described, sides[1].title),
            *window_notes(
                {side.title: side.model for side in sides}, max(map(len, [*prompts, *more_prompts])), max_new_tokens
            ),
            *notes,
            *compile_notes([run.method for run in runs]),
            *refusals,
            *collapse_notes(compared, max_new_tokens, _describe_ended(runs, max_new_tokens)),
        ],
        "prompt_lengths": [len(prompt) for prompt in prompts],
        "rows": rows,
        "convergence": convergence,
        "comparison": compared,
        "methods": [_raw(run) for run in runs],
    }


# What is measured


def _list_sides(target: Any, cllm: Any) -> list[_Side]:
    title = TITLES["cllm"] if find_drafter(base_model_of(cllm)) is None else _LOSSLESS
    return [_Side("target", TITLES["target"], target, []), _Side("cllm", title, cllm, [])]


def _list_methods(
    side: _Side, block_sizes: Sequence[int | str], assistant: Any, is_compiled: bool, candidates: Sequence[int]
) -> list[DecodingMethod]:
    is_target = side.name == "target"
    assistant = assistant if is_target else None
    block_sizes = list(dict.fromkeys(block_sizes))
    methods = make_methods(side.model, block_sizes, assistant, is_target, is_compiled, candidates)
    return [replace(method, name=f"{side.title}, {method.name}") for method in methods]


def _decode(
    sides: Sequence[_Side],
    methods: dict[str, list[DecodingMethod]],
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    repeats: int,
    pad_token_id: int,
    show_progress: bool,
) -> tuple[list[_Run], list[str]]:
    """Decode the timed prompts in all ways that the models take, and say which they do not."""
    known, refusals = [], []
    for side in sides:
        taken, refusal = leave_out_refused(methods[side.name], prompts, max_new_tokens, pad_token_id)
        if refusal is not None:
            refusals.append(f"Candidates are left out for the {side.title}: {refusal}")
        known += [(side, method) for method in taken]
    timed = [method for _, method in known]
    results = benchmark_decoding(
        timed, prompts, max_new_tokens, show_progress, repeats=repeats, pad_token_id=pad_token_id
    )
    return [_Run(side, method, result) for (side, method), result in zip(known, results)], refusals


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


def _judge_all(runs: list[_Run], judge: Judge | None) -> None:
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


def _measure_memory(runs: list[_Run], prompts: Sequence[list[int]], max_new_tokens: int, pad_token_id: int) -> None:
    """Off the clock, on the prompts that are longest with their responses. What compiled code holds is not known."""
    for run in runs:
        if run.method.is_compiled:
            continue
        lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, run.result.responses)]
        longest = sorted(range(len(prompts)), key=lambda index: -lengths[index])[:_NUM_MEMORY_PROMPTS]
        chosen = [prompts[index] for index in longest]
        with PeakMemory(run.method.model.device) as memory:
            decode_all(run.method, chosen, max_new_tokens, 1, pad_token_id, show_progress=False)
        run.peak_memory = memory.num_bytes


def _measure_sides(
    baselines: Sequence[_Run], prompts: Sequence[list[int]], block_size: int, pad_token_id: int
) -> tuple[dict[str, Any], list[str]]:
    """Statistics of each model's trajectories, `None` for a model that cannot give any, and the reasons as notes."""
    found: dict[str, Any] = {run.side.name: None for run in baselines}
    notes = []
    for run in baselines:
        side, some = run.side, prompts[:_MOST_TRAJECTORIES]
        if find_drafter(base_model_of(side.model)) is not None:
            notes.append(f"How blocks of the {side.title} converge is not measured: they are those of its base model.")
            continue
        try:
            statistics = measure_convergence(
                side.model, some, run.result.responses, block_size, pad_token_id, run.method.stop_ids
            )
        except ValueError as error:
            notes.append(f"The trajectories of the {side.title} are not measured: {error}")
            continue
        found[side.name] = statistics.to_dict()
        if statistics.num_left_out_blocks:
            notes.append(
                f"{statistics.num_left_out_blocks} blocks of the {side.title} have no trajectory: there its response "
                "is not greedy by its plain logits, as after a processor."
            )
    return found, notes


def measure_convergence(
    model: Any,
    prompts: Sequence[list[int]],
    responses: Sequence[list[int]],
    block_size: int,
    pad_token_id: int = 0,
    stop_ids: Collection[int] = (),
) -> TrajectoryStatistics:
    """
    Collect the trajectories of a model's own greedy responses, in memory, and measure them.

    Blocks in which a response is not greedy by the model's plain logits, as after a processor of its generation
    config, are left out, and counted. Two models get the same draws of first drafts.
    """
    model = base_model_of(model)
    check_packable(model)
    requests = [
        Request(list(prompt), list(response), (0, number))
        for number, (prompt, response) in enumerate(zip(prompts, responses))
        if response
    ]
    sizes = [(len(request.prompt_ids) + len(request.response_ids), len(request.response_ids)) for request in requests]
    total = TrajectoryStatistics(block_size)
    for batch in batch_by_tokens(sizes, DEFAULT_TOKENS_PER_BATCH):
        chosen = [requests[index] for index in batch]
        found = collect_trajectories(model, chosen, block_size, pad_token_id, stop_ids, keep_not_greedy=True)
        total += measure_trajectories([vars(trajectory) for trajectory in found], block_size)
    return total


# What is reported


def _compare_responses(target: _Run, cllm: _Run, max_new_tokens: int) -> dict[str, Any]:
    runs, pairs = (target, cllm), list(zip(target.responses, cllm.responses))
    compared: dict[str, Any] = {
        "num_responses": len(pairs),
        "num_equal": sum(ours == theirs for ours, theirs in pairs),
        "mean_tokens": {run.side.name: sum(map(len, run.responses)) / len(pairs) for run in runs},
        "num_cut_off": {
            run.side.name: sum(run.is_cut_off(response, max_new_tokens) for response in run.responses) for run in runs
        },
        "kinds": None,
        "paired": None,
    }
    if target.judgements is not None and cllm.judgements is not None:
        judgements = {"target": target.judgements, "cllm": cllm.judgements}
        compared["kinds"] = {name: count_right(given)["kinds"] for name, given in judgements.items()}
        compared["paired"] = compare_judgements(target.judgements, cllm.judgements)
    return compared


def _row(run: _Run, target: _Run, own: _Run) -> dict[str, Any]:
    result, assistant = run.result, run.method.options.get("assistant_model")
    used = [run.method.model] + [assistant] * (assistant is not None)
    return {
        "name": result.name,
        "model": run.side.name,
        "tokens_per_second": result.tokens_per_second,
        "speedup_over_target": _speedup(result, target.result),
        "speedup_over_own": _speedup(result, own.result),
        "tokens_per_forward": result.tokens_per_forward if sum(result.num_forwards) else None,
        "accuracy": None if run.judgements is None else count_right(run.judgements),
        "num_parameters": run.method.model.num_parameters(),
        "num_assistant_parameters": None if assistant is None else assistant.num_parameters(),
        "weight_bytes": sum(map(_weight_bytes, used)),
        "peak_memory": run.peak_memory,
    }


def _speedup(result: DecodingResult, baseline: DecodingResult) -> float | None:
    """`None` where the baseline has said nothing to some prompt, which is no speed to compare with."""
    return result.speedup_over(baseline) if all(baseline.responses) else None


def _weight_bytes(model: Any) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _raw(run: _Run) -> dict[str, Any]:
    judgements = run.judgements
    return {
        **raw_result(run.method, run.result),
        "peak_memory": run.peak_memory,
        "more_responses": run.side.more,
        "judgements": None if judgements is None else [[one.is_right, one.kind] for one in judgements],
    }


def _describe(model: Any) -> dict[str, Any]:
    environment = describe_environment(model)
    names = ("device", "dtype", "attention", "architecture", "num_parameters")
    described = {name: environment[name] for name in names}
    return {"name": base_model_of(model).name_or_path, "has_adapter": base_model_of(model) is not model, **described}


def _describe_ended(runs: Sequence[_Run], max_new_tokens: int) -> str:
    """Tokens per forward pass of the CLLM's timed responses that are not cut off; empty if there are none."""
    figures, share = [], ""
    for run in runs:
        responses, forwards = run.result.responses, run.result.num_forwards
        ended = [n for n, response in enumerate(responses) if not run.is_cut_off(response, max_new_tokens)]
        num_forwards = sum(forwards[n] for n in ended)  # 0 too where those of a method are not known
        if run.side.name == "cllm" and run.method.options.get("decoding") == "jacobi" and num_forwards:
            figures.append(f"{sum(len(responses[n]) for n in ended) / num_forwards:.2f} for {run.result.name}")
            share = f"{len(ended)} of {len(responses)}"
    return f"Tokens per forward pass of the {share} timed ones that end: {', '.join(figures)}." if figures else ""
