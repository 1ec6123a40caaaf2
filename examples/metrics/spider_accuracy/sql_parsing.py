"""Parsing SQL that a model has written, with `sqlglot`, in bounded time and without a word."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .sql_text import MAX_QUERY_LENGTH, without_comments


try:
    from sqlglot import exp
    from sqlglot.dialects.sqlite import SQLite
except ImportError:  # said when a query is to be parsed: execution accuracy does without
    exp = SQLite = None  # type: ignore[assignment, misc]


# The queries of Spider make at most 2 nodes a token. A parser that goes back and tries again makes twice as many with
# each level of `DATE(DATE(...))`.
_NODES_PER_TOKEN = 4
_SPARE_NODES = 2000
_Parser: Any = object if SQLite is None else SQLite.parser_class


class NotParsed(ValueError):
    """A text is not one query that can be taken apart."""


class _BoundedParser(_Parser):
    """Gives up when it has made more nodes than a query of this length can have."""

    nodes_left = 0

    def expression(self, *args: Any, **kwargs: Any) -> Any:
        self.nodes_left -= 1
        if self.nodes_left < 0:
            raise NotParsed("It is nested in a way that takes too long to parse.")
        return super().expression(*args, **kwargs)


def parse_query(query: str) -> exp.Select | exp.SetOperation | exp.Subquery:
    """
    Parse one query.

    Args:
        query (`str`): SQL.

    Returns:
        `exp.Select`, `exp.SetOperation` or `exp.Subquery`: its tree.

    Raises:
        ImportError: if `sqlglot` is not installed.
        NotParsed: if it is not one query, is longer than 100,000 characters, or takes too long to parse.
        Exception: whatever `sqlglot` raises for a text that it cannot parse.
    """
    if SQLite is None:
        raise ImportError(
            "Exact match of SQL needs the package `sqlglot`, which is not installed. Run `pip install "
            "cllm_hf[spider]`, or measure execution accuracy alone."
        )
    if len(query) > MAX_QUERY_LENGTH:
        raise NotParsed(f"There must be at most {MAX_QUERY_LENGTH:,} characters, got {len(query):,}.")
    query = without_comments(query)
    dialect = SQLite()
    with _silence():
        tokens = dialect.tokenize(query)
        parser = _BoundedParser(dialect=dialect)
        parser.nodes_left = _NODES_PER_TOKEN * len(tokens) + _SPARE_NODES
        statements = [statement for statement in parser.parse(tokens, query) if statement is not None]
    if len(statements) != 1 or not isinstance(statements[0], (exp.Select, exp.SetOperation, exp.Subquery)):
        raise NotParsed(f"There must be one query, got {query!r:.200}.")
    return statements[0]


@contextmanager
def _silence() -> Iterator[None]:
    """Without the warnings that `sqlglot` logs in this thread, about what it does not know."""
    thread = threading.get_ident()

    def is_from_elsewhere(_: logging.LogRecord) -> bool:
        return threading.get_ident() != thread

    logger = logging.getLogger("sqlglot")
    logger.addFilter(is_from_elsewhere)
    try:
        yield
    finally:
        logger.removeFilter(is_from_elsewhere)
