"""What `benchmark.py overhead` does: the time of an iteration over the time of the bare forward pass in it."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from cllm_hf._host import CACHE_NAME, base_model_of
from cllm_hf.cards import format_table
from cllm_hf.evaluation.benchmark import DecodingMethod, synchronize
from cllm_hf.evaluation.comparison import BareForward
from cllm_hf.evaluation.reporting import compile_notes, describe_environment, format_environment


def overhead_methods(model: Any, block_sizes: Sequence[int], is_compiled: bool = False) -> list[DecodingMethod]:
    """
    List what to measure: `generate()` for reference, then Jacobi decoding at each block size.

    Args:
        model (`transformers.PreTrainedModel` or `peft.PeftModel`): the model.
        block_sizes (`Sequence[int]`): values of `jacobi_block_size`.
        is_compiled (`bool`): whether to have each with a compiled forward pass too.

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
    pairs: bool | None = None,
    show_progress: bool = True,
) -> dict[str, Any]:
    """
    Measure iterations inside `generate` and bare forward passes of the same widths and cache lengths, in turns.

    Args:
        methods (`Sequence[DecodingMethod]`): of one model whose text does not end by itself.
        prompt (`list[int]`): token ids.
        iterations (`int`): iterations of a round.
        rounds (`int`): how often each method has its turn, after one turn that is left out.
        pairs (`bool`, *optional*): whether iterations are clocked one by one, each beside a bare forward pass;
            otherwise a long `generate` less a short one is. By default so on CPU only; compiled methods never.
        show_progress (`bool`): whether to draw a progress bar.

    Returns:
        `dict`: everything that was measured, ready for JSON; `format_overhead` makes a text of such.

    Raises:
        ValueError: if a response is too short to measure.
    """
    model = methods[0].model
    pairs = model.device.type == "cpu" if pairs is None else pairs
    records: list[list[dict[str, list[float]]]] = [[] for _ in methods]
    turns = [turn for turn in range(rounds + 1) for _ in methods]
    for index, turn in enumerate(tqdm(turns, desc="Measuring", unit="turn", disable=not show_progress)):
        method = methods[index % len(methods)]
        clock = _paired_iterations if pairs and not method.is_compiled else _mean_iteration
        record = clock(method, prompt, iterations)
        if turn > 0:
            records[index % len(methods)].append(record)
    return {
        "kind": "overhead",
        "environment": describe_environment(model),
        "settings": {"iterations": iterations, "rounds": rounds, "prompt_length": len(prompt), "pairs": pairs},
        "notes": compile_notes(methods),
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
        f"{settings['rounds']} rounds of {settings['iterations']} iterations after a prompt of "
        f"{settings['prompt_length']} tokens."
    )
    machines = [f"{report['name']}: {format_environment(report['environment'])}" for report in reports]
    return "\n\n".join([format_table(header, rows), setting, *machines, *reports[0]["notes"]])


def _width(method: DecodingMethod) -> int:
    return method.options.get("jacobi_block_size", 1)


def _generate(method: DecodingMethod, prompt: list[int], max_new_tokens: int) -> tuple[float, list[int]]:
    """Seconds of a `generate`, and the tokens gained in each of its forward passes."""
    input_ids = torch.tensor([prompt], device=method.model.device)
    synchronize(input_ids.device)
    start = time.perf_counter()
    output = method.model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        return_dict_in_generate=True,
        **method.call_options,
    )
    synchronize(input_ids.device)
    seconds = time.perf_counter() - start
    stats = getattr(output, "jacobi_stats", None)
    num_generated = output.sequences.shape[1] - len(prompt)
    return seconds, [1] * num_generated if stats is None else stats.num_committed[0]


def _full_iterations(prompt_length: int, width: int, max_new_tokens: int, committed: list[int]) -> list[int]:
    """
    Find the forward passes after the prefill that are as wide as they can be: near the end there is less left to
    guess.

    Args:
        prompt_length (`int`): tokens of the prompt.
        width (`int`): tokens that a forward pass feeds when it is not near the end.
        max_new_tokens (`int`): longest response.
        committed (`list[int]`): tokens gained in each forward pass, prefill first.

    Returns:
        `list[int]`: tokens in the cache before each.
    """
    gained = list(itertools.accumulate(committed))
    # The last token gained is not in the cache yet.
    return [prompt_length + before - 1 for before in gained[:-1] if max_new_tokens - before >= width]


def _paired_iterations(method: DecodingMethod, prompt: list[int], iterations: int) -> dict[str, list[float]]:
    """
    Clock each iteration from one call of the model to the next, and a bare forward pass like it just before.

    Neighbors meet the machine at the same speed. The hook that runs the bare forward pass stops the iteration's clock.
    """
    model, width = method.model, _width(method)
    bare = BareForward(model, width)
    pairs: dict[str, list[float]] = {"iteration_seconds": [], "forward_seconds": []}
    is_prefill, is_bare, start = True, False, None

    def on_call(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal is_prefill, is_bare, start
        if is_bare:
            return
        synchronize(model.device)
        if start is not None:
            pairs["iteration_seconds"].append(time.perf_counter() - start)
            start = None
        # Near the end there is less left to guess, and forward passes are narrower.
        if not is_prefill and kwargs["input_ids"].shape[1] == width and len(pairs["forward_seconds"]) < iterations:
            is_bare = True
            pairs["forward_seconds"].append(bare.seconds(kwargs[CACHE_NAME].get_seq_length()))
            is_bare = False
            start = time.perf_counter()
        is_prefill = False

    handle = base_model_of(model).register_forward_pre_hook(on_call, with_kwargs=True)
    try:
        _generate(method, prompt, iterations + width + 1)
    finally:
        handle.remove()
    num_pairs = len(pairs["iteration_seconds"])
    if num_pairs == 0:
        raise _too_short(iterations + width + 1)
    return {name: values[:num_pairs] for name, values in pairs.items()}


def _mean_iteration(method: DecodingMethod, prompt: list[int], iterations: int) -> dict[str, list[float]]:
    """Clock a long `generate` less a short one, which share prefill and end, then bare forward passes as between."""
    short_seconds, short = _generate(method, prompt, _width(method))
    max_new_tokens = iterations + _width(method)
    long_seconds, long = _generate(method, prompt, max_new_tokens)
    full = _full_iterations(len(prompt), _width(method), max_new_tokens, long)
    if len(long) <= len(short) or not full:
        raise _too_short(max_new_tokens)
    bare = BareForward(method.model, _width(method))
    return {
        "iteration_seconds": [(long_seconds - short_seconds) / (len(long) - len(short))],
        "forward_seconds": [bare.seconds(length) for length in full[:iterations]],
    }


def _too_short(max_new_tokens: int) -> ValueError:
    return ValueError(
        f"A response must take several iterations to be measured, got one of at most {max_new_tokens} tokens in which "
        "all drafts were accepted. Raise `--iterations` or lower `--block-sizes`."
    )


def _row(method: DecodingMethod, records: list[dict[str, list[float]]]) -> dict[str, Any]:
    summaries = [_summary(**record) for record in records]
    iterations, forwards, ratios = zip(*summaries)
    return {
        "method": method.name,
        "n": _width(method),
        "iteration_seconds": statistics.median(iterations),
        "forward_seconds": statistics.median(forwards),
        "ratio": statistics.median(ratios),
        "rounds": records,
    }


def _summary(iteration_seconds: list[float], forward_seconds: list[float]) -> tuple[float, float, float]:
    """A round's iteration, forward, and ratio: medians of pairs, or means where the iteration is a mean."""
    if len(iteration_seconds) == len(forward_seconds):
        ratio = statistics.median(ours / bare for ours, bare in zip(iteration_seconds, forward_seconds))
        return statistics.median(iteration_seconds), statistics.median(forward_seconds), ratio
    forward = statistics.fmean(forward_seconds)
    return iteration_seconds[0], forward, iteration_seconds[0] / forward
