"""
Metrics as classes of `evaluate`, which takes seconds to import: the speed of decoding, and what metrics of the answers
to a task build on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import datasets
import evaluate

from .judgements import Judgement, count_right
from .speed import measure_speed


class LocalMetric(evaluate.Metric):
    """A metric that keeps what it is given in memory and needs neither files nor network."""

    def __init__(self, **kwargs: Any):
        super().__init__(**{"keep_in_memory": True, **kwargs})

    @property
    def name(self) -> str:
        """`str`: of the class; `evaluate.combine` tells metrics apart by it, and the host takes that of the file."""
        return type(self).__name__

    def describe(self, features: dict[str, Any], citation: str = "") -> evaluate.MetricInfo:
        """
        What `_info` returns, with the text of the class's docstring.

        Args:
            features (`dict`): name and feature of each input.
            citation (`str`): of the publication.

        Returns:
            `evaluate.MetricInfo`.
        """
        doc = type(self).__doc__ or ""
        description = doc.strip().partition("\n")[0]
        return evaluate.MetricInfo(
            description=description, citation=citation, inputs_description=doc, features=datasets.Features(features)
        )


class TextMetric(LocalMetric):
    """A metric of texts that a model has written: none of them stops the others from being judged."""

    def add(self, **inputs: Any) -> None:
        """As that of `evaluate.Metric`, for one prediction."""
        cleaning = {"prediction": self.clean_prediction, "reference": self.clean_reference}
        super().add(**{name: cleaning.get(name, _keep)(value) for name, value in inputs.items()})

    def add_batch(self, **inputs: Any) -> None:
        """As that of `evaluate.Metric`, for several predictions; `compute` calls it with what it is given."""
        cleaning = {"predictions": self.clean_prediction, "references": self.clean_reference}
        super().add_batch(
            **{
                name: values if values is None else [cleaning.get(name, _keep)(value) for value in values]
                for name, values in inputs.items()
            }
        )

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
        return asdict(measure_speed(tokens, seconds, forwards, baseline_seconds, baseline_tokens))


def _keep(value: Any) -> Any:
    return value


def summarize(judgements: Sequence[Judgement]) -> dict[str, Any]:
    """
    Count right answers.

    Args:
        judgements (`Sequence[Judgement]`): one an answer.

    Returns:
        `dict`: `accuracy`, `interval` (bounds from 0 to 1, at a confidence of 95%), `num_right`, `num_answers` and
        `kinds`, the number of answers of each kind.
    """
    accuracy = count_right(judgements)
    return {
        "accuracy": accuracy.share,
        "interval": list(accuracy.interval),
        "num_right": accuracy.num_right,
        "num_answers": accuracy.num_answers,
        "kinds": accuracy.kinds,
    }
