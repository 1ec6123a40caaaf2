"""The metrics as classes of `evaluate`, which takes seconds to import."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import evaluate

from ..judgements import Judgement, count_right
from .gsm8k import judge_gsm8k
from .speed import measure_speed
from .spider import GoldQueryError, judge_exact_match, judge_sql, read_schema
from .sql import QueryLimits, QueryRunner


_TEXT = datasets.Value("string")


class _LocalMetric(evaluate.Metric):
    """A metric that keeps what it is given in memory and needs neither files nor network."""

    def __init__(self, **kwargs: Any):
        super().__init__(**{"keep_in_memory": True, **kwargs})

    @property
    def name(self) -> str:
        """`str`: of the class; `evaluate.combine` tells metrics apart by it, and the host takes that of the file."""
        return type(self).__name__

    def _describe(self, features: dict[str, Any], citation: str = "") -> evaluate.MetricInfo:
        doc = type(self).__doc__ or ""
        description = doc.strip().partition("\n")[0]
        return evaluate.MetricInfo(
            description=description, citation=citation, inputs_description=doc, features=datasets.Features(features)
        )


class _TextMetric(_LocalMetric):
    """A metric of texts that a model has written: none of them stops the others from being judged."""

    def add(self, **inputs: Any) -> None:
        """As that of `evaluate.Metric`, for one prediction."""
        cleaning = {"prediction": self._clean_prediction, "reference": self._clean_reference}
        super().add(**{name: cleaning.get(name, _keep)(value) for name, value in inputs.items()})

    def add_batch(self, **inputs: Any) -> None:
        """As that of `evaluate.Metric`, for several predictions; `compute` calls it with what it is given."""
        cleaning = {"predictions": self._clean_prediction, "references": self._clean_reference}
        super().add_batch(
            **{
                name: values if values is None else [cleaning.get(name, _keep)(value) for value in values]
                for name, values in inputs.items()
            }
        )

    def _clean_prediction(self, value: Any) -> Any:
        """A missing one says nothing; half a surrogate pair, as JSON may hold it, is no text for Arrow."""
        if value is None:
            return ""
        return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value

    def _clean_reference(self, value: Any) -> Any:
        return value


class GSM8KAccuracy(_TextMetric):
    """
    Share of responses to problems of GSM8K whose number is right.

    `predictions` are responses; `references` are answers of the data set, or numbers as texts.

    Returns a dict: `accuracy`, `interval` (bounds from 0 to 1, at a confidence of 95%), `num_right`, `num_answers` and
    `kinds`, the number of answers of each kind of `cllm_hf.evaluation.metrics.gsm8k.judge_gsm8k`.

    Args:
        **kwargs: arguments of `evaluate.Metric`; `keep_in_memory` is `True` here by default.

    Example:

    ```python
    metric = cllm_hf.GSM8KAccuracy()
    metric.compute(predictions=["2 * 9 = 18\\n#### 18"], references=["#### 18"])["accuracy"]  # 1.0
    ```
    """

    def _info(self) -> evaluate.MetricInfo:
        return self._describe({"predictions": _TEXT, "references": _TEXT}, "arXiv 2110.14168")

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
        return _summarize([judge_gsm8k(answer, reference) for answer, reference in zip(predictions, references)])


class SpiderAccuracy(_TextMetric):
    """
    Shares of SQL queries that return what the gold query returns, and that have its clauses.

    `predictions` are queries; `references` are dicts with the gold `query` and, with `database_folder`, the `db_id`,
    else the path of the `database`. Other keys are left out. Predicted queries are run as
    `cllm_hf.evaluation.metrics.sql` describes.

    Returns a dict: for the execution `accuracy`, `interval` (bounds from 0 to 1, at a confidence of 95%), `num_right`,
    `num_answers` and `kinds`, the number of queries of each kind of `cllm_hf.evaluation.metrics.spider.judge_sql`; and
    `exact_match`, `exact_match_interval`, `exact_match_num_right` and `exact_match_kinds` for the clauses.

    Args:
        database_folder (`str` or `Path`, *optional*): where `<db_id>/<db_id>.sqlite` are.
        exact_match (`bool`): whether to compare clauses, too, which needs the package `sqlglot`.
        keep_distinct (`bool`): whether `DISTINCT` counts in execution, as it does not in the published
            evaluator unless asked for; see `judge_sql`.
        limits (`QueryLimits`, *optional*): of each query.
        **kwargs: arguments of `evaluate.Metric`; `keep_in_memory` is `True` here by default.

    Raises:
        ImportError: if `exact_match` is asked for and `sqlglot` is not installed.
        GoldQueryError: by `compute`, if a gold query returns no rows, or its database cannot be read.

    Example:

    ```python
    metric = cllm_hf.SpiderAccuracy(database_folder="spider/database")
    reference = {"query": "SELECT count(*) FROM singer", "db_id": "concert_singer"}
    metric.compute(predictions=["SELECT count(singer_id) FROM singer"], references=[reference])["accuracy"]  # 1.0
    ```
    """

    def __init__(
        self,
        database_folder: str | Path | None = None,
        exact_match: bool = True,
        keep_distinct: bool = False,
        limits: QueryLimits | None = None,
        **kwargs: Any,
    ):
        if exact_match and importlib.util.find_spec("sqlglot") is None:
            raise ImportError(
                "`exact_match` needs the package `sqlglot`, which is not installed. Run `pip install "
                "cllm_hf[spider]`, or pass `exact_match=False`."
            )
        self.database_folder = None if database_folder is None else Path(database_folder)
        self.exact_match, self.keep_distinct, self.limits = exact_match, keep_distinct, limits
        super().__init__(**kwargs)

    @property
    def _keys(self) -> tuple[str, str]:
        return "query", "database" if self.database_folder is None else "db_id"

    def _clean_reference(self, value: Any) -> Any:
        """Without the keys that its features do not know."""
        missing = [key for key in self._keys if key not in value]
        if missing:
            raise ValueError(
                f"A reference must have the keys {self._keys}, got {sorted(value)}. With `database_folder` a database "
                "is named by its `db_id`, without by its path in `database`."
            )
        return {key: str(value[key]) if isinstance(value[key], Path) else value[key] for key in self._keys}

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": _TEXT, "references": {key: _TEXT for key in self._keys}}
        return self._describe(features, "arXiv 1809.08887, 2010.02840")

    def _compute(self, predictions: Sequence[str], references: Sequence[dict[str, str]]) -> dict[str, Any]:
        executed, matched = [], []
        schemas: dict[Path, dict[str, list[str]]] = {}
        with ExitStack() as stack:
            runner = stack.enter_context(QueryRunner(self.limits))
            for index, (prediction, reference) in enumerate(zip(predictions, references)):
                database, gold_query = self._database_of(reference), reference["query"]
                try:
                    executed.append(judge_sql(prediction, gold_query, database, runner, self.keep_distinct))
                    if self.exact_match:
                        if database not in schemas:
                            schemas[database] = read_schema(database, runner)
                        matched.append(judge_exact_match(prediction, gold_query, schemas[database]))
                except GoldQueryError as error:
                    raise GoldQueryError(f"Reference {index}: {error}") from error
        result = _summarize(executed)
        if self.exact_match:
            exact = _summarize(matched)
            result["exact_match"] = exact["accuracy"]
            result.update({f"exact_match_{name}": exact[name] for name in ("interval", "num_right", "kinds")})
        return result

    def _database_of(self, reference: dict[str, str]) -> Path:
        if self.database_folder is None:
            return Path(reference["database"])
        name = reference["db_id"]
        return self.database_folder / name / f"{name}.sqlite"


class DecodingSpeed(_LocalMetric):
    """
    Speed of decoding.

    `tokens` (generated), `seconds` (of the whole `generate`, prefill included) and `forwards` (calls of the model,
    prefill included) are numbers of each prompt. `compute` also takes `baseline_seconds`, and `baseline_tokens` if
    these differ, of another way to decode the same prompts.

    Returns a dict: `tokens_per_second` (median over the prompts), `tokens_per_forward` (all tokens over all forwards)
    and `speedup` (median of the ratio to the baseline, or `None`).

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
        return self._describe({"tokens": whole, "seconds": datasets.Value("float64"), "forwards": whole})

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


def _summarize(judgements: Sequence[Judgement]) -> dict[str, Any]:
    accuracy = count_right(judgements)
    return {
        "accuracy": accuracy.share,
        "interval": list(accuracy.interval),
        "num_right": accuracy.num_right,
        "num_answers": accuracy.num_answers,
        "kinds": accuracy.kinds,
    }
