"""Trained heads next to `generate()` and to what this package has, on the same prompts, in turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cllm_hf._host import base_model_of
from cllm_hf.evaluation.agreement import COLUMNS, agreement_notes, compare_texts
from cllm_hf.evaluation.benchmark import DecodingMethod, benchmark_decoding, make_methods
from cllm_hf.evaluation.comparison import check_models, check_prompts, raw_result
from cllm_hf.evaluation.reporting import (
    compile_notes,
    describe_environment,
    describe_prompts,
    format_environment,
    format_number,
    format_rate,
    format_rows,
)

from .heads import Heads, MedusaHeads
from .heads_decoding import register_heads


@dataclass
class Contestants:
    """
    What is compared.

    Attributes:
        model (`transformers.PreTrainedModel`): the target model.
        heads (`dict[str, tuple]`): by their kind, heads and what is known of their training.
        lossless (`PeftModel`, *optional*): the target model, loaded once more, with a lossless adapter.
        cllm (`Any`, *optional*): a CLLM that was trained from the target model.
        assistant (`Any`, *optional*): a draft model.
    """

    model: Any
    heads: dict[str, tuple[Heads, dict[str, Any]]] = field(default_factory=dict)
    lossless: Any = None
    cllm: Any = None
    assistant: Any = None


def heads_methods(
    contestants: Contestants, block_size: int, candidates: Sequence[int] = (), is_compiled: bool = False
) -> list[tuple[DecodingMethod, int, int | None]]:
    """
    List the ways to decode, `generate()` of the target model first.

    Args:
        contestants (`Contestants`): what is compared.
        block_size (`int`): tokens that a forward pass checks, but for Medusa at most one more than it has heads.
        candidates (`Sequence[int]`): numbers of further guesses: each adds a row wherever something drafts.
        is_compiled (`bool`): whether rows with a compiled forward pass are added.

    Returns:
        `list[tuple]`: each with the place of its own model's `generate()` in the list, and how many parameters were
        trained for it where that is known.
    """
    model = contestants.model
    rows: list[tuple[DecodingMethod, int, int | None]] = [
        (method, 0, None) for method in make_methods(model, [], contestants.assistant, is_compiled=is_compiled)
    ]
    for kind, (heads, _) in contestants.heads.items():
        size = min(block_size, heads.num_heads + 1) if isinstance(heads, MedusaHeads) else block_size
        rows += [
            (method, 0, _count(heads)) for method in _methods_of(kind, heads, model, size, candidates, is_compiled)
        ]
    more: dict[str, Any] = {"prompt_lookup": False, "is_compiled": is_compiled, "candidates": candidates}
    if contestants.lossless is not None:
        methods = make_methods(contestants.lossless, [block_size], **more)
        parameters = base_model_of(contestants.lossless).named_parameters()
        trained = sum(value.numel() for name, value in parameters if "lora_" in name or "cllm_" in name)
        rows += [(method, 0, trained) for method in methods if not method.name.startswith("generate()")]
    if contestants.cllm is not None:
        own = len(rows)
        for method in make_methods(contestants.cllm, [block_size], **more):
            method.name = f"CLLM: {method.name}"
            rows.append((method, own, None))
    return rows


def compare_heads(
    contestants: Contestants,
    prompts: Sequence[list[int]],
    block_size: int = 8,
    max_new_tokens: int = 128,
    candidates: Sequence[int] = (),
    repeats: int = 1,
    is_compiled: bool = False,
    pad_token_id: int = 0,
    show_progress: bool = True,
) -> dict[str, Any]:
    """
    Decode the same prompts in all ways, one at a time and in turns.

    Args:
        contestants (`Contestants`): what is compared.
        prompts (`Sequence[list[int]]`): token ids.
        block_size (`int`): tokens that a forward pass checks.
        max_new_tokens (`int`): tokens of a response at most.
        candidates (`Sequence[int]`): numbers of further guesses for rows of their own.
        repeats (`int`): rounds over the prompts.
        is_compiled (`bool`): whether rows with a compiled forward pass are added.
        pad_token_id (`int`): of the tokenizer.
        show_progress (`bool`): whether a bar says how far it is.

    Returns:
        `dict`: the result, ready for JSON; `format_heads` makes a text of it.

    Raises:
        ValueError: if models do not fit each other, or prompts do not fit them.
    """
    model = contestants.model
    for other in (contestants.lossless, contestants.cllm):
        check_models(model, model if other is None else other, contestants.assistant)
    check_prompts(prompts, [], model)
    listed = heads_methods(contestants, block_size, candidates, is_compiled)
    methods = [method for method, _, _ in listed]
    results = benchmark_decoding(methods, prompts, max_new_tokens, show_progress, 1, repeats, pad_token_id)
    rows = [
        {
            "name": method.name,
            "tokens_per_second": result.tokens_per_second,
            "tokens_per_forward": result.tokens_per_forward,
            "speedup": result.speedup_over(results[0]),
            "trained_parameters": trained,
            **compare_texts(method, prompts, result, results[own]),
        }
        for (method, own, trained), result in zip(listed, results)
    ]
    trainings = {
        kind: {name: value for name, value in known.items() if name != "losses"}
        for kind, (_, known) in contestants.heads.items()
    }
    return {
        "kind": "heads",
        "environment": describe_environment(model),
        "settings": {"max_new_tokens": max_new_tokens, "repeats": repeats, "num_prompts": len(prompts)},
        "trainings": trainings,
        "notes": [*map(_training_note, trainings.items()), *compile_notes(methods), *agreement_notes(rows)],
        "prompt_lengths": [len(prompt) for prompt in prompts],
        "methods": [raw_result(method, result) for method, result in zip(methods, results)],
        "rows": rows,
    }


def format_heads(report: dict[str, Any]) -> str:
    """
    Write the result of `compare_heads`, or what `json.loads` has made of it.

    Args:
        report (`dict`): the result.

    Returns:
        `str`: Markdown.
    """
    settings = report["settings"]
    table = format_rows(
        report["rows"],
        {
            "method": lambda row: row["name"],
            "tokens/s": format_rate,
            "tokens per forward pass": lambda row: format_number(row["tokens_per_forward"]),
            "speed-up over generate()": lambda row: format_number(row["speedup"], "x"),
            "equal to own generate()": lambda row: f"{row['num_equal']}/{settings['num_prompts']}",
            **COLUMNS,
            "trained, M": lambda row: _millions(row["trained_parameters"]),
        },
    )
    setting = (
        f"Prompts: {describe_prompts(report['prompt_lengths'])}, one at a time. New tokens: at most "
        f"{settings['max_new_tokens']}. Rounds: {settings['repeats']}."
    )
    return "\n\n".join([table, setting, format_environment(report["environment"]), *report["notes"]])


def _methods_of(
    kind: str, heads: Heads, model: Any, block_size: int, candidates: Sequence[int], is_compiled: bool
) -> list[DecodingMethod]:
    """The ways to decode by heads."""
    decoding, name = f"benchmark_{kind}", f"{kind} {block_size}"
    register_heads(decoding, heads, model)
    methods = []
    for count in dict.fromkeys([0, *candidates]):
        more = f", {count} candidate{'s' * (count > 1)}" if count else ""
        options = {"decoding": decoding, "jacobi_block_size": block_size, "jacobi_candidates": count}
        methods.append(DecodingMethod(f"{name}{more}", model, options))
    if is_compiled:
        options = {"decoding": decoding, "jacobi_block_size": block_size, "jacobi_compile": True}
        methods.append(DecodingMethod(f"{name}, compiled", model, options, is_compiled=True))
    return methods


def _count(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _millions(count: int | None) -> str | None:
    return None if count is None else f"{count / 1e6:.2f}"


def _training_note(item: tuple[str, dict[str, Any]]) -> str:
    kind, known = item
    return (
        f"{kind}: trained on {known['records']:,} records in {known['steps']:,} optimizer steps of "
        f"{known['batch_size']} records, {known['seconds']:.0f} seconds."
    )
