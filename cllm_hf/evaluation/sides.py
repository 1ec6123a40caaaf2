"""The two models that are compared, the ways in which they decode, and what a report says of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .._host import base_model_of
from ..blocks.drafter import find_drafter
from .benchmark import DecodingMethod, DecodingResult, make_methods
from .comparison import raw_result
from .judgements import Judgement, compare_judgements, count_right
from .reporting import describe_environment


TITLES = {"target": "target model", "cllm": "CLLM"}
_LOSSLESS = "lossless adapter"  # in place of a CLLM


@dataclass
class Side:
    """One of the two models, and its responses to further prompts, which are decoded in batches."""

    name: str  # "target" or "cllm"
    title: str
    model: Any
    more: list[list[int]]
    # Whether it is a lossless adapter on the target model's own weights: its `generate()` is then the target model's.
    drafts_for_target: bool = False


@dataclass
class Run:
    """A way in which a model decodes, and all that is known of what it did."""

    side: Side
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


def list_sides(target: Any, cllm: Any) -> list[Side]:
    """The target model and what it is compared with."""
    is_lossless = find_drafter(base_model_of(cllm)) is not None
    drafts_for_target = is_lossless and cllm is not target and _has_weights_of(cllm, target)
    title = _LOSSLESS if is_lossless else TITLES["cllm"]
    return [
        Side("target", TITLES["target"], target, []),
        Side("cllm", title, cllm, [], drafts_for_target),
    ]


@torch.no_grad()
def _has_weights_of(adapted: Any, target: Any) -> bool:
    """Whether a model is another one, weight for weight, when its adapter is put aside."""
    if find_drafter(base_model_of(target)) is not None:
        return False
    parameters = base_model_of(adapted).named_parameters()
    own = {name.replace(".base_layer.", "."): weight for name, weight in parameters}
    pairs = [(weight, own.get(name)) for name, weight in base_model_of(target).named_parameters()]
    return all(
        other is not None
        and weight.dtype == other.dtype
        and not (weight.is_meta or other.is_meta)  # offloaded: nobody knows
        and torch.equal(weight.to(other.device), other)
        for weight, other in pairs
    )


def list_methods(
    side: Side, block_sizes: Sequence[int | str], assistant: Any, is_compiled: bool, candidates: Sequence[int]
) -> list[DecodingMethod]:
    """The ways to decode of a side, `generate()` first, unless that is the target model's."""
    is_target = side.name == "target"
    assistant = assistant if is_target else None
    block_sizes = list(dict.fromkeys(block_sizes))
    methods = make_methods(side.model, block_sizes, assistant, is_target, is_compiled, candidates)
    if side.drafts_for_target:
        methods = [method for method in methods if "jacobi_block_size" in method.options]
    return [replace(method, name=f"{side.title}, {method.name}") for method in methods]


def compare_responses(target: Run, cllm: Run, max_new_tokens: int) -> dict[str, Any]:
    runs, pairs = (target, cllm), list(zip(target.responses, cllm.responses))
    compared: dict[str, Any] = {
        # Whether the second one is an adapter that drafts for the first: what is compared are then its own texts.
        "is_one_model": cllm.side.drafts_for_target,
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


def make_row(run: Run, target: Run, own: Run) -> dict[str, Any]:
    result, assistant = run.result, run.method.options.get("assistant_model")
    used = [run.method.model] + [assistant] * (assistant is not None)
    return {
        "name": result.name,
        "model": run.side.name,
        "tokens_per_second": result.tokens_per_second,
        "speedup_over_target": speedup_over(result, target.result),
        "speedup_over_own": speedup_over(result, own.result),
        "tokens_per_forward": result.tokens_per_forward if sum(result.num_forwards) else None,
        "accuracy": None if run.judgements is None else count_right(run.judgements),
        "num_parameters": run.method.model.num_parameters(),
        "num_assistant_parameters": None if assistant is None else assistant.num_parameters(),
        "weight_bytes": sum(map(_weight_bytes, used)),
        "peak_memory": run.peak_memory,
    }


def speedup_over(result: DecodingResult, baseline: DecodingResult) -> float | None:
    """`None` where the baseline has said nothing to some prompt, which is no speed to compare with."""
    return result.speedup_over(baseline) if all(baseline.responses) else None


def _weight_bytes(model: Any) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def raw_run(run: Run) -> dict[str, Any]:
    judgements = run.judgements
    return {
        **raw_result(run.method, run.result),
        "peak_memory": run.peak_memory,
        "more_responses": run.side.more,
        "judgements": None if judgements is None else [[one.is_right, one.kind] for one in judgements],
    }


def describe_model(model: Any) -> dict[str, Any]:
    environment = describe_environment(model)
    names = ("device", "dtype", "attention", "architecture", "num_parameters")
    described = {name: environment[name] for name in names}
    return {"name": base_model_of(model).name_or_path, "has_adapter": base_model_of(model) is not model, **described}


def describe_ended(runs: Sequence[Run], max_new_tokens: int) -> str:
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
