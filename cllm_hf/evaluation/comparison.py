"""What `cllm benchmark decode` does: several ways to decode next to `generate()`, and what each could gain at most."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from .._host import CACHE_NAME, base_model_of
from ..blocks.limits import check_room
from ..options import JacobiOptions
from .agreement import COLUMNS, agreement_notes, compare_texts
from .benchmark import (
    DecodingMethod,
    DecodingResult,
    benchmark_decoding,
    describe_method,
    leave_out_refused,
    make_methods,
    synchronize,
)
from .progress import Say
from .reporting import (
    compile_notes,
    describe_environment,
    describe_prompts,
    format_environment,
    format_line,
    format_number,
    format_rate,
    format_rows,
)


_NUM_AUTO_WIDTHS = 4
_NUM_WARM_UPS = 3


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
    say: Say | None = None,
    on_result: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """
    Measure all ways to decode on the same prompts, and the cost of the forward passes that they make.

    The arguments are the options of the command. Prompt lookup and an assistant take part for a batch size of 1 only.
    A model that refuses candidates has no rows with them, and a note says why. The result is ready for JSON;
    `format_comparison` makes a text of it. `say` gets lines on how far it is, `on_result` each row when it is done.
    """
    check_assistant(assistant, batch_size)
    check_candidates(candidates)
    check_room(base_model_of(model), max(map(len, prompts), default=0), max_new_tokens)
    methods = make_methods(model, block_sizes, assistant, batch_size == 1, is_compiled, candidates)
    methods, refusal = leave_out_refused(methods, prompts, max_new_tokens, pad_token_id)
    results = benchmark_decoding(
        methods, prompts, max_new_tokens, show_progress, batch_size, repeats, pad_token_id, say
    )
    cache_length = _middle_length(prompts, results[0])
    # A tree has more tokens than positions, so that as many in a row may be more than the model has.
    most = (getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf) - cache_length
    known = [int(min(size, most)) for size in block_sizes if isinstance(size, int)]
    widths = [1, *known, *(width for width in _changing_widths(methods, results) if width <= most)]
    forwards = compare_widths(model, widths, cache_length, min(batch_size, len(prompts)))
    notes = []
    if batch_size > 1:
        notes.append("Prompt lookup is left out: transformers decodes one prompt at a time by it.")
    if refusal is not None:
        notes.append(f"Candidates are left out: {refusal}")
    notes += compile_notes(methods)
    rows = []
    for method, result in zip(methods, results):
        agreement = compare_texts(method, prompts, result, results[0])
        rows.append({**_row(method, result, results[0], forwards), **agreement})
        if on_result is not None:
            on_result(rows[-1])
    notes += agreement_notes(rows)
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
        "rows": rows,
    }


def check_assistant(assistant: object, batch_size: int) -> None:
    if assistant is not None and batch_size > 1:
        raise ValueError(
            f"Assisted decoding takes one prompt at a time, got `--assistant` with `--batch-size {batch_size}`. Drop "
            "one of the two."
        )


def check_candidates(candidates: Sequence[object]) -> None:
    """Refuse numbers of candidates that `generate` refuses."""
    for count in candidates:
        JacobiOptions(candidates=count)  # type: ignore[arg-type]


def _vocab_size(model: Any) -> int:
    return model.config.get_text_config().vocab_size


def check_models(target: Any, cllm: Any, assistant: Any) -> None:
    """Check that models can be compared with each other."""
    if target is not cllm and base_model_of(target) is base_model_of(cllm):
        raise ValueError(
            "The target model and the CLLM must not share their weights, got an adapter on the very model that it is "
            "compared with: its layers would act in both. Load the target model a second time."
        )
    size = _vocab_size(target)
    if size != _vocab_size(cllm):
        raise ValueError(
            f"The target model and the CLLM must have the same vocabulary, got {size} and {_vocab_size(cllm)} tokens. "
            "Pass the model that the CLLM was trained from."
        )
    if assistant is None:
        return
    if base_model_of(assistant) in (base_model_of(target), base_model_of(cllm)):
        raise ValueError(
            "The assistant must be a model of its own, got one of the two that are compared, whose forward passes "
            "could not be told apart. Load it a second time."
        )
    if _vocab_size(assistant) != size:
        raise ValueError(
            f"The assistant must have the tokenizer of the target model, of {size} tokens, got one of "
            f"{_vocab_size(assistant)} tokens. Pass a smaller model of the same family, or none."
        )


def check_prompts(prompts: Sequence[list[int]], more_prompts: Sequence[list[int]], model: Any) -> None:
    """Check that there are prompts, and that the model has their tokens."""
    limit = _vocab_size(model)
    for name, rows in (("prompts", prompts), ("more_prompts", more_prompts)):
        for number, row in enumerate(rows):
            if not len(row):
                raise ValueError(f"Every prompt must have at least one token, got none in `{name}[{number}]`.")
            if not 0 <= min(row) <= max(row) < limit:
                raise ValueError(
                    f"The tokens of a prompt must be of the models' vocabulary, from 0 to {limit - 1}, got {min(row)} "
                    f"to {max(row)} in `{name}[{number}]`. Use the models' own tokenizer."
                )


def raw_result(method: DecodingMethod, result: DecodingResult) -> dict[str, Any]:
    """What a method did, ready for JSON."""
    return {
        **describe_method(method),
        "responses": result.responses,
        "num_forwards": result.num_forwards,
        "seconds": result.seconds,
        "widths": {str(width): count for width, count in sorted(result.widths.items())},
        "peak_memory": result.peak_memory,
    }


def format_comparison(report: dict[str, Any]) -> str:
    """Write the result of `compare_decoding`, or what `json.loads` has made of it, as Markdown."""
    settings = report["settings"]
    table = format_rows(report["rows"], _columns(settings["num_prompts"]))
    setting = (
        f"Prompts: {describe_prompts(report['prompt_lengths'])}, in batches of {settings['batch_size']}. New tokens: "
        f"at most {settings['max_new_tokens']}. Rounds: {settings['repeats']}. t(n) is after "
        f"{report['cache_length']} cached tokens."
    )
    return "\n\n".join([table, setting, format_environment(report["environment"]), *report["notes"]])


def format_decode_row(row: dict[str, Any], num_prompts: int) -> str:
    """A row of `compare_decoding` as a line."""
    return format_line(row, _columns(num_prompts))


def _columns(num_prompts: int) -> dict[str, Callable[[dict[str, Any]], str | None]]:
    return {
        "method": lambda row: row["name"],
        "tokens/s": format_rate,
        "tokens per forward pass": lambda row: format_number(row["tokens_per_forward"]),
        "t(n)/t(1)": lambda row: format_number(row["relative_cost"]),
        "limit": lambda row: format_number(row["limit"], "x"),
        "speed-up over generate()": lambda row: format_number(row["speedup"], "x"),
        "equal": lambda row: f"{row['num_equal']}/{num_prompts}",
        **COLUMNS,
        "peak MiB": lambda row: None if row["peak_memory"] is None else f"{row['peak_memory'] / 2**20:.0f}",
    }


def _middle_length(prompts: Sequence[list[int]], result: DecodingResult) -> int:
    """Tokens in the cache half-way through a usual response."""
    prompt_length = statistics.median(map(len, prompts))
    return max(int(prompt_length + statistics.median(map(len, result.responses)) / 2), 1)


def _changes_width(method: DecodingMethod) -> bool:
    """Whether the forward passes of a method, other than near the end, have several widths."""
    options = method.options
    return method.has_candidates or options.get("decoding") == "lossless" or options.get("jacobi_block_size") == "auto"


def _changing_widths(methods: Sequence[DecodingMethod], results: Sequence[DecodingResult]) -> list[int]:
    """With block size "auto" the widths that forward passes mostly have, with trees the middle and the widest."""
    found: list[int] = []
    for method, result in zip(methods, results):
        if method.has_candidates or method.options.get("decoding") == "lossless":
            widths = sorted(result.widths.elements())
            found += [widths[len(widths) // 2], widths[-1]] if widths else []
        elif _changes_width(method):
            found += [width for width, _ in result.widths.most_common(_NUM_AUTO_WIDTHS)]
    return found


def _row(
    method: DecodingMethod, result: DecodingResult, baseline: DecodingResult, forwards: dict[int, list[float]]
) -> dict[str, Any]:
    block_size = method.options.get("jacobi_block_size")
    cost = None
    if _changes_width(method):
        if result.widths:
            total = sum(count * relative_cost(forwards, width) for width, count in result.widths.items())
            cost = total / sum(result.widths.values())
    elif isinstance(block_size, int) and not method.is_compiled:
        cost = relative_cost(forwards, block_size)
    # `generate()` makes a forward pass a token, but in a batch its ended rows stay until the last one has.
    gain = result.tokens_per_forward / baseline.tokens_per_forward
    return {
        "name": result.name,
        "tokens_per_second": result.tokens_per_second,
        "tokens_per_forward": result.tokens_per_forward,
        "relative_cost": cost,
        "limit": None if cost is None else gain / cost,
        "speedup": result.speedup_over(baseline),
        "peak_memory": result.peak_memory,
    }


class BareForward:
    """A model with a cache of its own, to be timed on rows of random tokens with nothing around the forward pass."""

    def __init__(self, model: Any, width: int, batch_size: int = 1):
        self.width = width
        self._forward = base_model_of(model)
        config = model.config.get_text_config()
        generator = torch.Generator().manual_seed(0)
        self._ids = torch.randint(config.vocab_size, (batch_size, width), generator=generator).to(model.device)
        self._cache = DynamicCache(config=config)
        self._cache.activate_past_recording()  # layers that see a window only can then be cut too

    @torch.no_grad()
    def seconds(self, cache_length: int) -> float:
        """
        Time one forward pass after `cache_length` tokens in the cache: no fewer than in the call before, since layers
        that see a window cannot go back further. The cache is filled and cut outside the clocks.
        """
        length = self._cache.get_seq_length()
        surplus = length - cache_length
        if length > 0:
            self._cache.crop(-max(surplus, 0))
        if surplus < 0:
            filler = self._ids.repeat(1, -(surplus // self.width))[:, :-surplus]
            self._forward(filler, **{CACHE_NAME: self._cache}, use_cache=True)
            self._cache.crop(0)  # lets go of what has left a window
        device = self._ids.device
        synchronize(device)
        start = time.perf_counter()
        self._forward(self._ids, **{CACHE_NAME: self._cache}, use_cache=True)
        synchronize(device)
        return time.perf_counter() - start


def compare_widths(
    model: Any, widths: Sequence[int], cache_length: int, batch_size: int = 1, iterations: int = 32
) -> dict[int, list[float]]:
    """Time forward passes of several widths, one of each in turn; the first few turns are left out."""
    forwards = [BareForward(model, width, batch_size) for width in sorted(set(widths))]
    seconds: dict[int, list[float]] = {forward.width: [] for forward in forwards}
    for _ in range(_NUM_WARM_UPS + iterations):
        for forward in forwards:
            seconds[forward.width].append(forward.seconds(cache_length))
    return {width: values[_NUM_WARM_UPS:] for width, values in seconds.items()}


def relative_cost(seconds: dict[int, list[float]], width: int) -> float:
    """
    Cost of a forward pass of some width in those of one token: the median of the ratios to a neighbor, interpolated
    between the widths that `compare_widths` has measured, of which 1 is one.
    """
    widths = sorted(seconds)
    costs = [statistics.median(value / one for value, one in zip(seconds[width], seconds[1])) for width in widths]
    return float(np.interp(width, widths, costs))
