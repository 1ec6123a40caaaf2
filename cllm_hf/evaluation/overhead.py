"""What `cllm benchmark overhead` does: the time of an iteration over the time of the bare forward in it."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from .._host import base_model_of
from .benchmark import DecodingMethod
from .environment import describe_environment, format_environment
from .forwards import synchronize, time_forwards
from .report import format_table


def overhead_methods(model: Any, block_sizes: Sequence[int], is_compiled: bool = False) -> list[DecodingMethod]:
    """
    List what to measure: `generate()` for reference, then Jacobi decoding at each block size.

    Args:
        model (`transformers.PreTrainedModel` or `peft.PeftModel`): the model.
        block_sizes (`Sequence[int]`): values of `jacobi_block_size`.
        is_compiled (`bool`): whether to have each with a compiled forward too.

    Returns:
        `list[DecodingMethod]`.
    """
    plain: list[tuple[str, dict[str, Any]]] = [("generate()", {"decoding": "autoregressive"})]
    plain += [("jacobi", {"decoding": "jacobi", "jacobi_block_size": size}) for size in block_sizes]
    methods = [DecodingMethod(name, model, options) for name, options in plain]
    if is_compiled:
        for name, options in plain:
            extra = {"cache_implementation": "static"} if name == "generate()" else {"jacobi_compile": True}
            methods.append(DecodingMethod(f"{name}, compiled", model, {**options, **extra}, is_compiled=True))
    return methods


def measure_overhead(
    methods: Sequence[DecodingMethod],
    prompt: list[int],
    iterations: int,
    rounds: int = 5,
    stamps: bool | None = None,
    show_progress: bool = True,
) -> dict[str, Any]:
    """
    Measure iterations inside `generate` and bare forwards of the same widths and cache lengths, in turns.

    Args:
        methods (`Sequence[DecodingMethod]`): of one model whose text does not end by itself.
        prompt (`list[int]`): token ids.
        iterations (`int`): iterations of a round.
        rounds (`int`): how often each method has its turn, after one turn that is left out.
        stamps (`bool`, *optional*): whether iterations are clocked one by one, by the times at which the model is
            called; otherwise a long `generate` less a short one is. By default so on CPU only; compiled methods never.
        show_progress (`bool`): whether to draw a progress bar.

    Returns:
        `dict`: everything that was measured, ready for JSON; `format_overhead` makes a text of such.

    Raises:
        ValueError: if a response is too short to measure.
    """
    model = methods[0].model
    stamps = model.device.type == "cpu" if stamps is None else stamps
    records: list[list[dict[str, Any]]] = [[] for _ in methods]
    turns = [turn for turn in range(rounds + 1) for _ in methods]
    for index, turn in enumerate(tqdm(turns, desc="Measuring", unit="turn", disable=not show_progress)):
        method = methods[index % len(methods)]
        clock = _stamped_iterations if stamps and not method.is_compiled else _mean_iteration
        seconds, cache_lengths = clock(method, prompt, iterations)
        forwards = time_forwards(model, cache_lengths, _width(method))
        if turn > 0:
            records[index % len(methods)].append({"iteration_seconds": seconds, "forward_seconds": forwards})
    return {
        "kind": "overhead",
        "environment": describe_environment(model),
        "settings": {"iterations": iterations, "rounds": rounds, "prompt_length": len(prompt), "stamps": stamps},
        "rows": [_row(method, rounds_of) for method, rounds_of in zip(methods, records)],
    }


def format_overhead(reports: Sequence[dict[str, Any]]) -> str:
    """
    Write results of `measure_overhead` as Markdown.

    Args:
        reports (`Sequence[dict]`): the result for each model with its `name`, or what `json.loads` has made of them.

    Returns:
        `str`: table, setting and machines.
    """
    header = ["model", "dtype", "method", "n", "ms per iteration", "ms per forward", "ratio"]
    rows = [
        [
            report["name"],
            report["environment"]["dtype"],
            row["method"],
            str(row["n"]),
            f"{1000 * row['iteration_seconds']:.3f}",
            f"{1000 * row['forward_seconds']:.3f}",
            f"{row['ratio']:.3f}",
        ]
        for report in reports
        for row in report["rows"]
    ]
    settings = reports[0]["settings"]
    setting = (
        f"{settings['rounds']} rounds of {settings['iterations']} iterations behind a prompt of "
        f"{settings['prompt_length']} tokens."
    )
    machines = [f"{report['name']}: {format_environment(report['environment'])}" for report in reports]
    return "\n\n".join([format_table(header, rows), setting, *machines])


def _width(method: DecodingMethod) -> int:
    return method.options.get("jacobi_block_size", 1)


def _generate(method: DecodingMethod, prompt: list[int], max_new_tokens: int) -> tuple[float, list[int]]:
    """Seconds of a `generate`, and the tokens gained in each of its forwards."""
    input_ids = torch.tensor([prompt], device=method.model.device)
    synchronize(input_ids.device)
    start = time.perf_counter()
    output = method.model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        return_dict_in_generate=True,
        **method.options,
    )
    synchronize(input_ids.device)
    seconds = time.perf_counter() - start
    stats = getattr(output, "jacobi_stats", None)
    num_generated = output.sequences.shape[1] - len(prompt)
    return seconds, [1] * num_generated if stats is None else stats.num_committed[0]


def _full_iterations(prompt_length: int, width: int, max_new_tokens: int, committed: list[int]) -> dict[int, int]:
    """
    Find the forwards after the prefill that are as wide as they can be: near the end there is less left to guess.

    Args:
        prompt_length (`int`): tokens of the prompt.
        width (`int`): tokens that a forward feeds when it is not near the end.
        max_new_tokens (`int`): longest response.
        committed (`list[int]`): tokens gained in each forward, prefill first.

    Returns:
        `dict[int, int]`: number of the forward and tokens in the cache before it.
    """
    gained = list(itertools.accumulate(committed))
    return {
        number: prompt_length + before - 1  # the last token gained is not in the cache yet
        for number, before in enumerate(gained[:-1], start=1)
        if max_new_tokens - before >= width
    }


def _stamped_iterations(method: DecodingMethod, prompt: list[int], iterations: int) -> tuple[list[float], list[int]]:
    """Seconds of each iteration, from one call of the model to the next, and the cache length before each."""
    stamps: list[float] = []
    device = method.model.device

    def stamp(*_: Any) -> None:
        synchronize(device)
        stamps.append(time.perf_counter())

    max_new_tokens = iterations + _width(method) + 1
    handle = base_model_of(method.model).register_forward_pre_hook(stamp)
    try:
        _, committed = _generate(method, prompt, max_new_tokens)
    finally:
        handle.remove()
    full = _full_iterations(len(prompt), _width(method), max_new_tokens, committed)
    numbers = [number for number in full if number + 1 < len(stamps)][:iterations]
    if not numbers:
        raise _too_short(max_new_tokens)
    return [stamps[number + 1] - stamps[number] for number in numbers], [full[number] for number in numbers]


def _mean_iteration(method: DecodingMethod, prompt: list[int], iterations: int) -> tuple[list[float], list[int]]:
    """Mean seconds of an iteration: a long `generate` less a short one; prefill and end are common to both."""
    short_seconds, short = _generate(method, prompt, _width(method))
    max_new_tokens = iterations + _width(method)
    long_seconds, long = _generate(method, prompt, max_new_tokens)
    full = _full_iterations(len(prompt), _width(method), max_new_tokens, long)
    if len(long) <= len(short) or not full:
        raise _too_short(max_new_tokens)
    return [(long_seconds - short_seconds) / (len(long) - len(short))], list(full.values())[:iterations]


def _too_short(max_new_tokens: int) -> ValueError:
    return ValueError(
        f"A response must take several iterations to be measured, got one of at most {max_new_tokens} tokens in which "
        "all drafts were accepted. Raise `--iterations` or lower `--block-sizes`."
    )


def _row(method: DecodingMethod, records: list[dict[str, Any]]) -> dict[str, Any]:
    # A difference of two `generate` is a mean, which other means must stand against.
    middle = statistics.median if len(records[0]["iteration_seconds"]) > 1 else statistics.fmean
    iterations = [middle(record["iteration_seconds"]) for record in records]
    forwards = [middle(record["forward_seconds"]) for record in records]
    return {
        "method": method.name,
        "n": _width(method),
        "iteration_seconds": statistics.median(iterations),
        "forward_seconds": statistics.median(forwards),
        "ratio": statistics.median(ours / bare for ours, bare in zip(iterations, forwards)),
        "rounds": records,
    }
