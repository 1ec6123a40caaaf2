"""Whether a query answers a question of Spider: by what it returns, and by how it is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

from cllm_hf.evaluation.judgements import Judgement

from .row_sets import results_match
from .sql import QueryResult, QueryRunner
from .sql_clauses import NotParsed, describe_query
from .sql_text import (
    MAX_QUERY_LENGTH,
    extract_query,
    has_order_by,
    join_operators,
    without_distinct,
    without_empty_statements,
)


_DATABASE_FAULTS = ("no database", "database in use")


class GoldQueryError(ValueError):
    """A query of the data set, or its database, gives no result to compare with; no fault of a prediction."""


def judge_sql(
    prediction: str,
    gold_query: str,
    database: str | Path,
    runner: QueryRunner | None = None,
    keep_distinct: bool = False,
) -> Judgement:
    """
    Judge a query by its execution: whether it returns what the gold query returns.

    The rule is that of Spider's test-suite evaluator (`exec_eval.py` of taoyds/test-suite-sql-eval; Zhong et al.,
    2020, arXiv 2010.02840) on one database. Results are equal if some order of the predicted columns gives the same
    rows, each as often, and in the same order if the gold query has an `ORDER BY`, be it in a subquery; names of
    columns do not count, 1 equals 1.0, and two empty results are equal. Operators in two pieces, such as `> =`, are
    put together first, and every `DISTINCT` is taken out of both queries, as that evaluator does unless it is told
    `--keep_distinct`; the operator `IS [NOT] DISTINCT FROM` stays. A semicolon counts if a statement comes after it.

    It differs from that evaluator's as follows. Of a prediction only the query counts, not what an instruct model
    writes around it (see `extract_query`). `ORDER BY` inside of quotes and comments does not count, and may have
    more than one space in it, as it is the query that orders, not its text. The search over columns is complete:
    there, it rests on a sample of the rows and on an order of values by their text. Queries that take more than
    `limits` are wrong. `YEAR(CURDATE())` has no meaning of its own.

    Args:
        prediction (`str`): what a model has written.
        gold_query (`str`): the right query.
        database (`str` or `Path`): an SQLite file.
        runner (`QueryRunner`, *optional*): runs both queries; by default one with the usual limits is started for this
            call.
        keep_distinct (`bool`): whether to run the queries as they are written, so that `DISTINCT` counts.

    Returns:
        `Judgement`: of the kind `"right"`, `"other result"`, or a kind of `QueryResult` that says why there is no
            result.

    Raises:
        GoldQueryError: if the gold query returns no result within the limits, or the database cannot be read.
    """
    prediction, gold_query = (_prepare(query, keep_distinct) for query in (extract_query(prediction), gold_query))
    with QueryRunner() if runner is None else nullcontext(runner) as active:
        gold = active.run(database, gold_query)
        _check_gold(gold, gold_query, database)
        predicted = active.run(database, prediction)
    if predicted.kind in _DATABASE_FAULTS:
        _check_gold(predicted, gold_query, database)
    if predicted.kind != "rows":
        return Judgement(False, predicted.kind)
    is_right = results_match(gold.rows, predicted.rows, has_order_by(gold_query))
    return Judgement(is_right, "right" if is_right else "other result")


def judge_exact_match(prediction: str, gold_query: str, schema: Mapping[str, Sequence[str]]) -> Judgement:
    """
    Judge a query by how it is written: whether it has the same clauses as the gold query.

    This follows Spider's exact set match without values (`evaluation.py` of taoyds/spider), of which
    `sql_clauses.describe_query` says what it leaves out. It is stricter than that evaluator in what the latter passes
    over: how `AND` and `OR` are nested, columns on the right of a comparison, the direction of each term that orders,
    all conditions of a join instead of the first one, outer joins, `UNION ALL`, and subqueries in `FROM`. It is more
    lenient in two things: `ORDER BY` may name a column by its alias, and what an inner join sets equal is one column,
    where there it is what the published schema calls a foreign key. And it parses all of SQLite's queries, up to
    100,000 characters and some hundred levels of nesting.

    Args:
        prediction (`str`): what a model has written.
        gold_query (`str`): the right query.
        schema (`Mapping[str, Sequence[str]]`): result of `read_schema`.

    Returns:
        `Judgement`: of the kind `"right"`, `"other clauses"`, or `"not parsed"`.

    Raises:
        GoldQueryError: if the gold query is not one query.
        ImportError: if `sqlglot` is not installed.
    """
    try:
        gold = describe_query(_prepare(gold_query), schema)
    except NotParsed as error:
        raise GoldQueryError(f"The gold query must be one query: {error}") from error
    try:
        is_right = describe_query(_prepare(extract_query(prediction)), schema) == gold
    except NotParsed:
        return Judgement(False, "not parsed")
    return Judgement(is_right, "right" if is_right else "other clauses")


def read_schema(database: str | Path, runner: QueryRunner | None = None) -> dict[str, list[str]]:
    """
    Read which tables and columns a database has.

    A table or view that cannot be read, such as a view of a table that is gone, is left out: only a query that uses it
    is at fault.

    Args:
        database (`str` or `Path`): an SQLite file.
        runner (`QueryRunner`, *optional*): reads them; by default one is started for this call.

    Returns:
        `dict[str, list[str]]`: names of the columns by that of their table or view, in lower case.

    Raises:
        GoldQueryError: if the database cannot be read.
    """
    schema = {}
    with QueryRunner() if runner is None else nullcontext(runner) as active:
        query = "SELECT name FROM sqlite_master WHERE type IN ('table', 'view')"
        tables = active.run(database, query)
        _check_gold(tables, query, database)
        for (name,) in tables.rows:
            query = 'SELECT * FROM "{}" LIMIT 0'.format(name.replace('"', '""'))
            columns = active.run(database, query)
            if columns.kind in _DATABASE_FAULTS:
                _check_gold(columns, query, database)
            if columns.kind == "rows":
                schema[name.lower()] = [column.lower() for column in columns.columns]
    return schema


def _prepare(query: str, keep_distinct: bool = True) -> str:
    """What counts of a query, by execution and by clauses. One that is too long stays as it is, and is refused."""
    if len(query) > MAX_QUERY_LENGTH:
        return query
    query = without_empty_statements(join_operators(query))
    return query if keep_distinct else without_distinct(query)


def _check_gold(result: QueryResult, query: str, database: str | Path) -> None:
    if result.kind != "rows":
        raise GoldQueryError(
            f"A query that others are compared with must return rows from {str(database)!r}, got {result.kind!r} "
            f"({result.message}) from {query!r:.1000}. Mend the data, or raise `limits` of the `QueryRunner`."
        )
