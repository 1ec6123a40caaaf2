"""What `cllm benchmark decode` does: several ways to decode next to `generate()`, and what each could gain at most."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from .._host import base_model_of
from ..blocks.drafter import find_drafter
from ..text import format_table
from .benchmark import (
    DecodingMethod,
    DecodingResult,
    benchmark_decoding,
    check_candidates,
    compile_notes,
    find_refusal,
    has_candidates,
)
from .environment import describe_environment, format_environment
from .forwards import compare_widths, relative_cost
from .near_ties import near_tie_notes


PROMPT_LOOKUP_TOKENS = 10
_NUM_AUTO_WIDTHS = 4


def make_methods(
    model: Any,
    block_sizes: Sequence[int | str],
    assistant: Any = None,
    prompt_lookup: bool = True,
    is_compiled: bool = False,
    candidates: Sequence[int] = (),
) -> list[DecodingMethod]:
    """
    List the ways to decode, `generate()` first. A model with a lossless adapter drafts by it in place of Jacobi.

    Args:
        model (`transformers.PreTrainedModel` or `peft.PeftModel`): the model.
        block_sizes (`Sequence[int | str]`): values of `jacobi_block_size`; larger ones than a lossless adapter drafts
            are cut to what it does.
        assistant (`transformers.PreTrainedModel`, *optional*): draft model of assisted decoding.
        prompt_lookup (`bool`): whether to have prompt lookup too.
        is_compiled (`bool`): whether to have `generate()` and Jacobi decoding with a compiled forward pass too.
        candidates (`Sequence[int]`): values of `jacobi_candidates`, each for a further method with every block size;
            0 adds none.

    Returns:
        `list[DecodingMethod]`.
    """
    # Training with gradient checkpointing may have left a model that goes without a cache by default.
    greedy = {"decoding": "autoregressive", "use_cache": True}
    methods = [DecodingMethod("generate()", model, greedy)]
    if prompt_lookup:
        options = {**greedy, "prompt_lookup_num_tokens": PROMPT_LOOKUP_TOKENS}
        methods.append(DecodingMethod("prompt lookup", model, options))
    if assistant is not None:
        methods.append(DecodingMethod("assisted", model, {**greedy, "assistant_model": assistant}))
    counts = dict.fromkeys([0, *candidates])
    drafter = find_drafter(base_model_of(model))
    if drafter is not None:
        most = drafter.num_masks + 1
        block_sizes = list(dict.fromkeys(size if isinstance(size, str) else min(size, most) for size in block_sizes))
    methods += [_parallel_method(model, block_size, count) for block_size in block_sizes for count in counts]
    if is_compiled:
        static = {**greedy, "cache_implementation": "static"}
        methods.append(DecodingMethod("generate(), compiled", model, static, is_compiled=True))
        methods += [
            _parallel_method(model, block_size, is_compiled=True)
            for block_size in block_sizes
            if block_size != "auto"  # a compiled forward pass has one shape
        ]
    return methods


def _parallel_method(
    model: Any, block_size: int | str, num_candidates: int = 0, is_compiled: bool = False
) -> DecodingMethod:
    way = "jacobi" if find_drafter(base_model_of(model)) is None else "lossless"
    name = f"{way} {block_size}"
    # Said without candidates too, as the model's generation config may have some.
    options = {"decoding": way, "jacobi_block_size": block_size, "jacobi_candidates": num_candidates}
    if num_candidates:
        name += f", {num_candidates} candidate{'s' * (num_candidates > 1)}"
    if is_compiled:
        name, options = f"{name}, compiled", {**options, "jacobi_compile": True}
    return DecodingMethod(name, model, options, is_compiled)


def compare_decoding(
    model: Any,
    prompts: Sequence[list[int]],
    block_sizes: Sequence[int | str],
    max_new_tokens: int,
    batch_size: int = 1,
    repeats: int = 1,
    assistant: Any = None,
    is_compiled: bool = False,
    pad_token_id: int = 0,
    show_progress: bool = True,
    candidates: Sequence[int] = (),
) -> dict[str, Any]:
    """
    Measure all ways to decode on the same prompts, and the cost of the forward passes that they make.

    Args:
        model (`transformers.PreTrainedModel` or `peft.PeftModel`): the model.
        prompts (`Sequence[list[int]]`): token ids of each prompt.
        block_sizes (`Sequence[int | str]`): values of `jacobi_block_size`.
        max_new_tokens (`int`): longest response.
        batch_size (`int`): prompts that are decoded together. Prompt lookup takes part for 1 only.
        repeats (`int`): rounds over all prompts.
        assistant (`transformers.PreTrainedModel`, *optional*): draft model of assisted decoding.
        is_compiled (`bool`): whether to have compiled forward passes too.
        pad_token_id (`int`): what pads prompts; it is masked.
        show_progress (`bool`): whether to draw a progress bar.
        candidates (`Sequence[int]`): values of `jacobi_candidates`, each for a further row with every block size. A
            model that refuses them has no such rows, and a note says why.

    Returns:
        `dict`: everything that was measured, ready for JSON; `format_comparison` makes a text of it.

    Raises:
        ValueError: if there are no prompts, an assistant is given for a batch, `candidates` has something else than
            integers of at least 0, or the model refuses another option.
    """
    check_assistant(assistant, batch_size)
    check_candidates(candidates)
    methods = make_methods(model, block_sizes, assistant, batch_size == 1, is_compiled, candidates)
    refusal = find_refusal(methods, prompts, max_new_tokens, pad_token_id)
    if refusal is not None:
        methods = [method for method in methods if not has_candidates(method)]
    results = benchmark_decoding(methods, prompts, max_new_tokens, show_progress, batch_size, repeats, pad_token_id)
    cache_length = _middle_length(prompts, results[0])
    # A tree has more tokens than positions, so that as many in a row may be more than the model has.
    most = (getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf) - cache_length
    changing = [width for width in _changing_widths(methods, results) if width <= most]
    widths = [1, *(size for size in block_sizes if isinstance(size, int)), *changing]
    forwards = compare_widths(model, widths, cache_length, min(batch_size, len(prompts)))
    notes = []
    if batch_size > 1:
        notes.append("Prompt lookup is left out: transformers decodes one prompt at a time by it.")
    if refusal is not None:
        notes.append(f"Candidates are left out: {refusal}")
    notes += compile_notes(methods)
    notes += near_tie_notes(prompts, [(method, result, results[0]) for method, result in zip(methods, results)])
    return {
        "kind": "decode",
        "environment": describe_environment(model),
        "settings": {
            "max_new_tokens": max_new_tokens,
            "batch_size": batch_size,
            "repeats": repeats,
            "num_prompts": len(prompts),
        },
        "notes": notes,
        "prompt_lengths": [len(prompt) for prompt in prompts],
        "cache_length": cache_length,
        "forward_seconds": {str(width): seconds for width, seconds in forwards.items()},
        "methods": [raw_result(method, result) for method, result in zip(methods, results)],
        "rows": [_row(method, result, results[0], forwards) for method, result in zip(methods, results)],
    }


def raw_result(method: DecodingMethod, result: DecodingResult) -> dict[str, Any]:
    """
    Turn what a method did into what JSON can hold.

    Args:
        method (`DecodingMethod`): the way to decode; a model among its options is put down by name.
        result (`DecodingResult`): what it did.

    Returns:
        `dict`.
    """
    options = {
        name: getattr(base_model_of(value), "name_or_path", value) if name == "assistant_model" else value
        for name, value in method.options.items()
    }
    return {
        "name": result.name,
        "options": options,
        "is_compiled": method.is_compiled,
        "responses": result.responses,
        "num_forwards": result.num_forwards,
        "seconds": result.seconds,
        "widths": {str(width): count for width, count in sorted(result.widths.items())},
        "peak_memory": result.peak_memory,
    }


def check_assistant(assistant: object, batch_size: int) -> None:
    """
    Refuse an assistant for a batch.

    Args:
        assistant (`object`): the draft model or its name; `None` for none.
        batch_size (`int`): prompts that are decoded together.

    Raises:
        ValueError: if there is an assistant and more than one prompt at a time.
    """
    if assistant is not None and batch_size > 1:
        raise ValueError(
            f"Assisted decoding takes one prompt at a time, got `--assistant` with `--batch-size {batch_size}`. Drop "
            "one of the two."
        )


def format_comparison(report: dict[str, Any]) -> str:
    """
    Write the result of `compare_decoding` as Markdown.

    Args:
        report (`dict`): the result, or what `json.loads` has made of it.

    Returns:
        `str`: table, machine and notes.
    """
    with_memory = any(row["peak_memory"] is not None for row in report["rows"])
    header = [
        "method",
        "tokens/s",
        "tokens per forward pass",
        "t(n)/t(1)",
        "limit",
        "speed-up over generate()",
        "equal",
    ]
    rows = []
    for row in report["rows"]:
        cells = [
            row["name"],
            f"{row['tokens_per_second']:.{0 if row['tokens_per_second'] >= 100 else 1}f}",
            f"{row['tokens_per_forward']:.2f}",
            "-" if row["relative_cost"] is None else f"{row['relative_cost']:.2f}",
            "-" if row["limit"] is None else f"{row['limit']:.2f}x",
            f"{row['speedup']:.2f}x",
            f"{row['num_equal']}/{report['settings']['num_prompts']}",
        ]
        if with_memory:
            cells.append("-" if row["peak_memory"] is None else f"{row['peak_memory'] / 2**20:.0f}")
        rows.append(cells)
    settings = report["settings"]
    lengths = report["prompt_lengths"]
    sizes = f"{min(lengths)} to {max(lengths)}" if min(lengths) < max(lengths) else f"{lengths[0]}"
    setting = (
        f"Prompts: {settings['num_prompts']} of {sizes} tokens, in batches of {settings['batch_size']}. New tokens: "
        f"at most {settings['max_new_tokens']}. Rounds: {settings['repeats']}. t(n) is behind "
        f"{report['cache_length']} cached tokens."
    )
    table = format_table(header + ["peak MiB"] * with_memory, rows)
    return "\n\n".join([table, setting, format_environment(report["environment"]), *report["notes"]])


def _middle_length(prompts: Sequence[list[int]], result: DecodingResult) -> int:
    """Tokens in the cache half-way through a usual response."""
    prompt_length = statistics.median(map(len, prompts))
    return max(int(prompt_length + statistics.median(map(len, result.responses)) / 2), 1)


def _changing_widths(methods: Sequence[DecodingMethod], results: Sequence[DecodingResult]) -> list[int]:
    """With block size "auto" the widths that forward passes mostly have, with trees the middle and the widest."""
    found: list[int] = []
    for method, result in zip(methods, results):
        if has_candidates(method) or method.options.get("decoding") == "lossless":
            widths = sorted(result.widths.elements())
            found += [widths[len(widths) // 2], widths[-1]] if widths else []
        elif method.options.get("jacobi_block_size") == "auto":
            found += [width for width, _ in result.widths.most_common(_NUM_AUTO_WIDTHS)]
    return found


def _row(
    method: DecodingMethod, result: DecodingResult, baseline: DecodingResult, forwards: dict[int, list[float]]
) -> dict[str, Any]:
    block_size = method.options.get("jacobi_block_size")
    cost = None
    changes_width = block_size == "auto" or has_candidates(method) or method.options.get("decoding") == "lossless"
    if isinstance(block_size, int) and not changes_width and not method.is_compiled:
        cost = relative_cost(forwards, block_size)
    elif changes_width and result.widths:
        total = sum(count * relative_cost(forwards, width) for width, count in result.widths.items())
        cost = total / sum(result.widths.values())
    # `generate()` makes a forward pass a token, but in a batch its ended rows stay until the last one has.
    gain = result.tokens_per_forward / baseline.tokens_per_forward
    return {
        "name": result.name,
        "tokens_per_second": result.tokens_per_second,
        "tokens_per_forward": result.tokens_per_forward,
        "relative_cost": cost,
        "limit": None if cost is None else gain / cost,
        "speedup": result.speedup_over(baseline),
        "num_equal": result.num_equal_to(baseline),
        "peak_memory": result.peak_memory,
    }
