"""
Metrics as classes of `evaluate`, which takes seconds to import: the speed of decoding, and what metrics of the answers
to a task build on.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from .judgements import Judgement, count_right


class LocalMetric(evaluate.Metric):
    """A metric that keeps what it is given in memory and needs neither files nor network."""

    def __init__(self, **kwargs: Any):
        super().__init__(**{"keep_in_memory": True, **kwargs})

    @property
    def name(self) -> str:
        """Of the class: `evaluate.combine` tells metrics apart by it, and `evaluate` takes that of the file."""
        return type(self).__name__

    def describe(self, features: dict[str, Any], citation: str = "") -> evaluate.MetricInfo:
        """What `_info` returns, with the text of the class's docstring."""
        doc = type(self).__doc__ or ""
        description = doc.strip().partition("\n")[0]
        return evaluate.MetricInfo(
            description=description, citation=citation, inputs_description=doc, features=datasets.Features(features)
        )


class TextMetric(LocalMetric):
    """A metric of texts that a model has written: none of them stops the others from being judged."""

    def add(self, **inputs: Any) -> None:
        """For one prediction."""  # `evaluate` adds to these docstrings
        super().add(**{name: self._clean(f"{name}s", value) for name, value in inputs.items()})

    def add_batch(self, **inputs: Any) -> None:
        """For several predictions; `compute` calls it with what it is given."""
        super().add_batch(
            **{
                name: values if values is None else [self._clean(name, value) for value in values]
                for name, values in inputs.items()
            }
        )

    def _clean(self, name: str, value: Any) -> Any:
        if name == "references":
            return self.clean_reference(value)
        return self.clean_prediction(value) if name == "predictions" else value

    def clean_prediction(self, value: Any) -> Any:
        """A missing one says nothing; half a surrogate pair, as JSON may hold it, is no text for Arrow."""
        if value is None:
            return ""
        return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value

    def clean_reference(self, value: Any) -> Any:
        """A reference as its features have it."""
        return value


class DecodingSpeed(LocalMetric):
    """
    Speed of decoding.

    `tokens` (generated), `seconds` (of the whole `generate`, prefill included) and `forwards` (calls of the model,
    prefill included) are numbers of each prompt. `compute` also takes `baseline_seconds`, and `baseline_tokens` if
    these differ, of another way to decode the same prompts.

    Returns a dict: `tokens_per_second` (median over the prompts), `tokens_per_forward` (all tokens over all forward
    passes) and `speedup` (median of the ratio to the baseline, or `None`).

    Args:
        **kwargs: arguments of `evaluate.Metric`; `keep_in_memory` is `True` here by default.

    Example:

    ```python
    metric = cllm_hf.DecodingSpeed()
    metric.add_batch(tokens=[64, 60], seconds=[0.5, 0.5], forwards=[16, 15])
    metric.compute(baseline_seconds=[1.0, 1.5])  # tokens_per_second 124.0, tokens_per_forward 4.0, speedup 2.5
    ```
    """

    def _info(self) -> evaluate.MetricInfo:
        whole = datasets.Value("int64")
        return self.describe({"tokens": whole, "seconds": datasets.Value("float64"), "forwards": whole})

    def _compute(
        self,
        tokens: Sequence[int],
        seconds: Sequence[float],
        forwards: Sequence[int],
        baseline_seconds: Sequence[float] | None = None,
        baseline_tokens: Sequence[int] | None = None,
    ) -> dict[str, Any]:
        return measure_speed(tokens, seconds, forwards, baseline_seconds, baseline_tokens)


def measure_speed(
    tokens: Sequence[int],
    seconds: Sequence[float],
    forwards: Sequence[int],
    baseline_seconds: Sequence[float] | None = None,
    baseline_tokens: Sequence[int] | None = None,
) -> dict[str, float | None]:
    """
    Put the speeds of single prompts together, as `DecodingSpeed` says.

    Prompts without any tokens are left out of the medians. The baseline has generated as many as `tokens` by default,
    which is so where both decode the same model greedily.
    """
    baseline_tokens = tokens if baseline_tokens is None else baseline_tokens
    columns = {"tokens": tokens, "seconds": seconds, "forwards": forwards, "baseline_tokens": baseline_tokens}
    if baseline_seconds is not None:
        columns["baseline_seconds"] = baseline_seconds
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"There must be one number of each kind for each prompt, got {lengths}.")
    for name, column in columns.items():
        may_be_0 = "tokens" in name
        for value in column:
            if not (value > 0 or (may_be_0 and value == 0)):
                rule = "at least 0" if may_be_0 else "above 0"
                raise ValueError(f"`{name}` must be {rule} for each prompt, got {value}.")
    kept = [index for index in range(len(tokens)) if tokens[index] and baseline_tokens[index]]
    if not kept:
        raise ValueError("There must be at least one prompt for which tokens were generated, got none.")
    rates = [tokens[index] / seconds[index] for index in kept]
    speedup = None
    if baseline_seconds is not None:
        baseline_rates = (baseline_tokens[index] / baseline_seconds[index] for index in kept)
        speedup = statistics.median(rate / baseline for rate, baseline in zip(rates, baseline_rates))
    return {
        "tokens_per_second": statistics.median(rates),
        "tokens_per_forward": sum(tokens) / sum(forwards),
        "speedup": speedup,
    }


def summarize(judgements: Sequence[Judgement]) -> dict[str, Any]:
    """What `count_right` says, as a metric calls it: `accuracy` in place of `share`."""
    counted = count_right(judgements)
    return {"accuracy": counted.pop("share"), **counted}
