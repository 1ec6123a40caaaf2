"""
Accuracy on GSM8K, as a metric of `evaluate`: `evaluate.load("examples/metrics/gsm8k_accuracy")`.

It copies the files that are imported here, and no others: those that these import are named too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from cllm_hf.evaluation import metrics  # a base class that was imported would be taken for the metric

from .gsm8k import judge_gsm8k
from .written_numbers import find_numbers


_TEXT = datasets.Value("string")
_COPIED = [find_numbers]


class GSM8KAccuracy(metrics.TextMetric):
    """
    Share of responses to problems of GSM8K whose number is right.

    `predictions` are responses; `references` are answers of the data set, or numbers as texts.

    Returns a dict: `accuracy`, `interval` (bounds from 0 to 1, at a confidence of 95%), `num_right`, `num_answers` and
    `kinds`, the number of answers of each kind of `judge_gsm8k`.

    Args:
        **kwargs: arguments of `evaluate.Metric`; `keep_in_memory` is `True` here by default.

    Example:

    ```python
    metric = evaluate.load("examples/metrics/gsm8k_accuracy")
    metric.compute(predictions=["2 * 9 = 18\\n#### 18"], references=["#### 18"])["accuracy"]  # 1.0
    ```
    """

    def _info(self) -> evaluate.MetricInfo:
        return self.describe({"predictions": _TEXT, "references": _TEXT}, "arXiv 2110.14168")

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
        return metrics.summarize(
            [judge_gsm8k(answer, reference) for answer, reference in zip(predictions, references)]
        )
