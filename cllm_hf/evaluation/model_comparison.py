"""A target model and its CLLM side by side: speed, quality and convergence of every way to decode, in one run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from .._host import base_model_of
from ..blocks.drafter import find_drafter
from ..options import check_block_size
from .benchmark import (
    DecodingMethod,
    DecodingResult,
    benchmark_decoding,
    check_candidates,
    compile_notes,
    decode_all,
    find_refusal,
    has_candidates,
    stop_ids_of,
)
from .comparison import make_methods, raw_result
from .convergence import measure_convergence
from .environment import describe_environment
from .judgements import Judgement, count_right
from .memory import PeakMemory
from .model_checks import check_counts, check_models, check_prompts
from .near_ties import near_tie_notes
from .paired import compare_judgements


Judge = Callable[[list[list[int]]], list[Judgement]]
TITLES = {"target": "target model", "cllm": "CLLM"}
_LOSSLESS = "lossless adapter"  # in place of a CLLM
_NUM_MEMORY_PROMPTS = 3
_MOST_TRAJECTORIES = 128
# From when on it is noted that more of the CLLM's responses are cut off than of the target model's: as a share of all
# responses, and at least how many, since of a few prompts one may be an accident.
_MANY_CUT_OFF = 0.05
_FEW_CUT_OFF = 2


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
    models = {"target": target, "cllm": cllm}
    titles = TITLES if find_drafter(base_model_of(cllm)) is None else {**TITLES, "cllm": _LOSSLESS}
    block_sizes = list(dict.fromkeys([block_size, *more_block_sizes]))
    runs = _list_runs(models, block_sizes, assistant, is_compiled, candidates, titles)
    with _evaluation_mode(target, cllm, assistant):
        runs, refusals = _leave_out_refused(runs, prompts, max_new_tokens, pad_token_id, titles)
        methods = [run.method for run in runs]
        results = benchmark_decoding(
            methods, prompts, max_new_tokens, show_progress, repeats=repeats, pad_token_id=pad_token_id
        )
        for run, result in zip(runs, results):
            run.result = result
        baselines = {run.model: run for run in reversed(runs)}  # the first of each model is `generate()`
        for run in baselines.values():
            more = decode_all(run.method, more_prompts, max_new_tokens, batch_size, pad_token_id, show_progress)
            for other in runs:
                if other.model == run.model:
                    other.more = more
        _judge_all(runs, judge, len(prompts) + len(more_prompts))
        _measure_memory(runs, prompts, max_new_tokens, pad_token_id)
        convergence, notes = _measure_convergence(baselines, prompts, block_size, pad_token_id)
        notes += near_tie_notes(prompts, [(run.method, run.result, baselines[run.model].result) for run in runs])
    settings = {
        "block_size": block_size,
        "max_new_tokens": max_new_tokens,
        "repeats": repeats,
        "num_prompts": len(prompts),
        "num_more_prompts": len(more_prompts),
        "batch_size": batch_size,
    }
    described = {name: _describe(model) for name, model in {**models, "assistant": assistant}.items() if model}
    compared = _compare_responses(baselines["target"], baselines["cllm"], max_new_tokens)
    notes = [
        *_window_notes(models, [*prompts, *more_prompts], max_new_tokens, titles),
        *notes,
        *compile_notes(methods),
    ]
    notes += refusals
    notes += _collapse_notes(compared, [run for run in runs if run.model == "cllm"], max_new_tokens)
    return {
        "kind": "models",
        "environment": describe_environment(target),
        "models": described,
        "titles": titles,
        "settings": settings,
        "notes": [*_difference_notes(described, titles), *notes],
        "prompt_lengths": [len(prompt) for prompt in prompts],
        "rows": [_row(run, baselines["target"], baselines[run.model]) for run in runs],
        "convergence": convergence,
        "comparison": compared,
        "methods": [_raw(run) for run in runs],
    }


@dataclass
class _Run:
    """A method, whose it is, and all that is known of what it did; `more` are its model's responses in batches."""

    model: str
    method: DecodingMethod
    result: DecodingResult
    more: list[list[int]]
    judgements: list[Judgement] | None = None
    peak_memory: int | None = None

    @property
    def responses(self) -> list[list[int]]:
        """To all prompts."""
        return [*self.result.responses, *self.more]


def _list_runs(
    models: dict[str, Any],
    block_sizes: Sequence[int | str],
    assistant: Any,
    is_compiled: bool,
    candidates: Sequence[int] = (),
    titles: dict[str, str] = TITLES,
) -> list[_Run]:
    options: dict[str, Any] = {"is_compiled": is_compiled, "candidates": candidates}
    listed = {
        "target": make_methods(models["target"], block_sizes, assistant, **options),
        "cllm": make_methods(models["cllm"], block_sizes, prompt_lookup=False, **options),
    }
    return [
        _Run(name, replace(method, name=f"{titles[name]}, {method.name}"), DecodingResult(method.name), [])
        for name, methods in listed.items()
        for method in methods
    ]


def _leave_out_refused(
    runs: list[_Run], prompts: Sequence[list[int]], max_new_tokens: int, pad_token_id: int, titles: dict[str, str]
) -> tuple[list[_Run], list[str]]:
    """Without the candidates of a model that takes none, and why as notes."""
    notes = []
    for name in titles:
        methods = [run.method for run in runs if run.model == name]
        refusal = find_refusal(methods, prompts, max_new_tokens, pad_token_id)
        if refusal is not None:
            runs = [run for run in runs if run.model != name or not has_candidates(run.method)]
            notes.append(f"Candidates are left out for the {titles[name]}: {refusal}")
    return runs, notes


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


def _judge_all(runs: list[_Run], judge: Judge | None, num_prompts: int) -> None:
    if judge is None:
        return
    known: dict[tuple[tuple[int, ...], ...], list[Judgement]] = {}
    for run in runs:
        key = tuple(map(tuple, run.responses))
        if key not in known:
            found = judge([list(response) for response in run.responses])
            if len(found) != num_prompts:
                raise ValueError(
                    f"`judge` must give one judgement for each of the {num_prompts} responses that it gets, got "
                    f"{len(found)}. Return them in the order of the responses, wrong ones too."
                )
            known[key] = list(found)
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


def _measure_convergence(
    baselines: dict[str, _Run], prompts: Sequence[list[int]], block_size: int, pad_token_id: int
) -> tuple[dict[str, Any], list[str]]:
    """Statistics of each model's trajectories, `None` for a model that cannot give any, and the reasons as notes."""
    found: dict[str, Any] = {}
    notes = []
    for name in TITLES:
        run = baselines[name]
        if find_drafter(base_model_of(run.method.model)) is not None:
            found[name] = None
            notes.append(f"How blocks of the {_LOSSLESS} converge is not measured: they are those of its base model.")
            continue
        some = list(prompts[:_MOST_TRAJECTORIES])
        stop_ids = stop_ids_of(run.method)
        try:
            statistics = measure_convergence(
                run.method.model, some, run.result.responses, block_size, pad_token_id, stop_ids
            )
        except ValueError as error:
            found[name] = None
            notes.append(f"The trajectories of the {TITLES[name]} are not measured: {error}")
            continue
        found[name] = statistics.to_dict()
        if statistics.num_left_out_blocks:
            notes.append(
                f"{statistics.num_left_out_blocks} blocks of the {TITLES[name]} have no trajectory: there its "
                "response is not greedy by its plain logits, as after a processor."
            )
    return found, notes


def _compare_responses(target: _Run, cllm: _Run, max_new_tokens: int) -> dict[str, Any]:
    pairs = list(zip(target.responses, cllm.responses))
    compared: dict[str, Any] = {
        "num_responses": len(pairs),
        "num_equal": sum(ours == theirs for ours, theirs in pairs),
        "mean_tokens": {run.model: sum(map(len, run.responses)) / len(pairs) for run in (target, cllm)},
        "num_cut_off": {run.model: _count_cut_off(run, max_new_tokens) for run in (target, cllm)},
        "kinds": None,
        "paired": None,
    }
    if target.judgements is None or cllm.judgements is None:
        return compared
    paired = compare_judgements(target.judgements, cllm.judgements)
    compared["kinds"] = {
        run.model: count_right(run.judgements).kinds for run in (target, cllm) if run.judgements is not None
    }
    compared["paired"] = {**asdict(paired), "difference": paired.difference, "p_value": paired.p_value}
    return compared


def _is_cut_off(run: _Run, response: list[int], max_new_tokens: int) -> bool:
    """Whether `max_new_tokens` has ended a response, and no stop token."""
    return len(response) == max_new_tokens and response[-1] not in stop_ids_of(run.method)


def _count_cut_off(run: _Run, max_new_tokens: int) -> int:
    return sum(_is_cut_off(run, response, max_new_tokens) for response in run.responses)


def _collapse_notes(compared: dict[str, Any], cllm_runs: Sequence[_Run], max_new_tokens: int) -> list[str]:
    """Repetition is easy to decode in parallel: many tokens per forward pass, which are worth nothing."""
    cut_off, total = compared["num_cut_off"], compared["num_responses"]
    if cut_off["cllm"] - cut_off["target"] <= max(_FEW_CUT_OFF, _MANY_CUT_OFF * total):
        return []
    return [
        f"**Read the CLLM's responses before its speed**: {cut_off['cllm']:,} of {total:,} run on to the "
        f"{max_new_tokens} new tokens at which they are cut off, and {cut_off['target']:,} of the target model's. A "
        "CLLM that repeats itself decodes fast and says nothing. A higher `ar_loss_weight`, a lower learning rate or "
        "more prompts help it to keep the texts of its target model."
        f"{_describe_ended(cllm_runs, max_new_tokens)}"
    ]


def _describe_ended(cllm_runs: Sequence[_Run], max_new_tokens: int) -> str:
    """Tokens per forward pass of the timed responses that are not cut off, after a space; empty if there are none."""
    figures, count, total = [], 0, 0
    for run in cllm_runs:
        responses, forwards = run.result.responses, run.result.num_forwards
        ended = [n for n, response in enumerate(responses) if not _is_cut_off(run, response, max_new_tokens)]
        num_forwards = sum(forwards[n] for n in ended)  # 0 too where those of a method are not known
        if run.method.options.get("decoding") == "jacobi" and num_forwards:
            figures.append(f"{sum(len(responses[n]) for n in ended) / num_forwards:.2f} for {run.result.name}")
            count, total = len(ended), len(responses)
    return (
        f" Tokens per forward pass of the {count} of {total} timed ones that end: {', '.join(figures)}."
        if figures
        else ""
    )


def _row(run: _Run, target: _Run, own: _Run) -> dict[str, Any]:
    result, assistant = run.result, run.method.options.get("assistant_model")
    accuracy = None
    if run.judgements is not None:
        counted = count_right(run.judgements)
        accuracy = {**asdict(counted), "share": counted.share, "interval": list(counted.interval)}
    used = [run.method.model] + [assistant] * (assistant is not None)
    return {
        "name": result.name,
        "model": run.model,
        "tokens_per_second": result.tokens_per_second,
        "speedup_over_target": _speedup(result, target.result),
        "speedup_over_own": _speedup(result, own.result),
        "tokens_per_forward": result.tokens_per_forward if sum(result.num_forwards) else None,
        "num_equal": result.num_equal_to(own.result),
        "accuracy": accuracy,
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
        "more_responses": run.more,
        "judgements": None if judgements is None else [[one.is_right, one.kind] for one in judgements],
    }


def _describe(model: Any) -> dict[str, Any]:
    environment = describe_environment(model)
    names = ("device", "dtype", "attention", "architecture", "num_parameters")
    described = {name: environment[name] for name in names}
    return {"name": base_model_of(model).name_or_path, "has_adapter": base_model_of(model) is not model, **described}


def _difference_notes(described: dict[str, dict[str, Any]], titles: dict[str, str]) -> list[str]:
    target, cllm = described["target"], described["cllm"]
    return [
        f"The target model and the {titles['cllm']} differ in more than their weights: {name} {target[name]} and "
        f"{cllm[name]}."
        for name in ("device", "dtype", "attention", "architecture")
        if target[name] != cllm[name]
    ]


def _window_notes(
    models: dict[str, Any], prompts: Sequence[list[int]], max_new_tokens: int, titles: dict[str, str]
) -> list[str]:
    """Beyond the window transformers goes on decoding, so that what is written there says little."""
    longest = max(map(len, prompts))
    windows = {
        name: getattr(model.config.get_text_config(), "max_position_embeddings", None)
        for name, model in models.items()
    }
    return [
        f"A prompt of {longest} tokens and a response of {max_new_tokens} are more than the {window} positions of the "
        f"{titles[name]}."
        for name, window in windows.items()
        if window is not None and longest + max_new_tokens > window
    ]
