"""
Accuracy on Spider, as a metric of `evaluate`: `evaluate.load("examples/metrics/spider_accuracy")`.

It copies the files that are imported here, and no others: those that these import are named too.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import datasets
import evaluate

from cllm_hf.evaluation import metrics  # a base class that was imported would be taken for the metric

from .row_sets import results_match
from .spider import GoldQueryError, judge_exact_match, judge_sql, read_schema
from .sql import QueryLimits, QueryRunner
from .sql_clauses import describe_query
from .sql_parsing import parse_query
from .sql_text import split_sql
from .sql_worker import READY


_TEXT = datasets.Value("string")
_COPIED = [results_match, describe_query, parse_query, split_sql, READY]


class SpiderAccuracy(metrics.TextMetric):
    """
    Shares of SQL queries that return what the gold query returns, and that have its clauses.

    `predictions` are queries; `references` are dicts with the gold `query` and, with `database_folder`, the `db_id`,
    else the path of the `database`. Other keys are left out. Predicted queries are run as
    the module `sql` describes.

    Returns a dict: for the execution `accuracy`, `interval` (bounds from 0 to 1, at a confidence of 95%), `num_right`,
    `num_answers` and `kinds`, the number of queries of each kind of `judge_sql`; and
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
    metric = evaluate.load("examples/metrics/spider_accuracy", database_folder="spider/database")
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

    def clean_reference(self, value: Any) -> Any:
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
        return self.describe(features, "arXiv 1809.08887, 2010.02840")

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
        result = metrics.summarize(executed)
        if self.exact_match:
            exact = metrics.summarize(matched)
            result["exact_match"] = exact["accuracy"]
            result.update({f"exact_match_{name}": exact[name] for name in ("interval", "num_right", "kinds")})
        return result

    def _database_of(self, reference: dict[str, str]) -> Path:
        if self.database_folder is None:
            return Path(reference["database"])
        name = reference["db_id"]
        return self.database_folder / name / f"{name}.sqlite"
