"""
What a query consists of, clause by clause, in a form that is equal for queries that differ only in how they are
written.

This is the idea of Spider's exact set match (Yu et al., 2018, arXiv 1809.08887). Parsing is done by `sqlglot`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


try:
    import sqlglot
    from sqlglot import exp
except ImportError as error:
    raise ImportError(
        "Exact match of SQL needs the package `sqlglot`, which is not installed. Run `pip install cllm_hf[spider]`, "
        "or measure execution accuracy alone."
    ) from error

_VALUE = "value"
_MIRRORED = {"gt": "lt", "gte": "lte"}


class NotParsed(ValueError):
    """A text is not one query that can be taken apart."""


def describe_query(query: str, schema: Mapping[str, Sequence[str]]) -> tuple[Any, ...]:
    """
    Take a query apart into its clauses.

    Left out is what the published rule leaves out, too: values that something is compared with, the number after
    `LIMIT` and `OFFSET`, `DISTINCT`, case, aliases, and the order of what stands in `SELECT`, in `GROUP BY`, between
    the `AND`s and `OR`s of a condition and between the tables of a join. Columns that an inner join sets equal are one
    column.

    Args:
        query (`str`): SQL.
        schema (`Mapping[str, Sequence[str]]`): names of the tables and of their columns, in lower case. They tell
            which table a bare name belongs to, and whether `"Asia"` in double quotes is a name or, as SQLite has it, a
            text.

    Returns:
        `tuple`: equal for queries with the same clauses.

    Raises:
        NotParsed: if it is not one query, or nested too deeply.
    """
    try:
        statements = [statement for statement in sqlglot.parse(query, read="sqlite") if statement is not None]
        if len(statements) != 1 or not isinstance(statements[0], (exp.Select, exp.SetOperation, exp.Subquery)):
            raise NotParsed(f"There must be one query, got {query!r}.")
        return _describe(statements[0], dict(schema), None)
    except (sqlglot.errors.SqlglotError, RecursionError) as error:
        raise NotParsed(f"{query!r} cannot be parsed: {error}") from error


class _Scope:
    """The names that mean something inside of a `SELECT`."""

    def __init__(self, select: Any, schema: dict[str, Sequence[str]], outer: _Scope | None):
        self.schema, self.outer = schema, outer
        self.sources: dict[str, tuple[str, Sequence[str]]] = {}  # by alias: name of the table, its columns
        self.tables: list[Any] = []
        self.projections = {p.alias.lower(): p.this for p in select.expressions if isinstance(p, exp.Alias)}
        self.equal: dict[str, str] = {}
        first, joins = select.args.get("from_"), select.args.get("joins") or []
        if first is not None:
            self._add_source(first.this, "")
        for join in joins:
            self._add_source(join.this, f"{join.method} {join.side}".strip().lower())
        self.conditions = _in_any_order(
            describe for join in joins for describe in self._describe_condition(join, list(self.sources))
        )

    def _add_source(self, source: exp.Expression, kind: str) -> None:
        if isinstance(source, exp.Table) and not source.args.get("joins"):
            name = source.name.lower()
            self.sources[source.alias_or_name.lower()] = name, self.schema.get(name, ())
            self.tables.append((kind, name))
        elif isinstance(source, exp.Subquery) and isinstance(source.this, (exp.Select, exp.SetOperation)):
            self.sources[source.alias_or_name.lower()] = "subquery", _column_names(source.this)
            self.tables.append((kind, _describe(source, self.schema, self.outer)))
        else:
            raise NotParsed(f"{source.sql()!r} after FROM or JOIN is not supported.")

    def _describe_condition(self, join: exp.Join, aliases: list[str]) -> list[Any]:
        """What joins two tables, before columns that are equal become one; and makes them so from here on."""
        condition = join.args.get("on")
        parts = list(condition.flatten()) if isinstance(condition, exp.And) else [condition] if condition else []
        described = [_describe_expression(part, self, merge=False) for part in parts]
        for column in join.args.get("using") or []:
            name = column.name.lower()
            owners = [table for table, columns in self.sources.values() if name in columns]
            described.append(("eq", *sorted(f"{table}.{name}" for table in owners)))
        if not join.side:  # an outer join leaves NULL in one of the two
            for part in described:
                if part[0] == "eq" and len(part) == 3 and all(isinstance(side, str) for side in part):
                    self._merge(part[1], part[2])
        return described

    def _merge(self, first: str, second: str) -> None:
        if first.partition(".")[0] == second.partition(".")[0]:  # of one table joined with itself
            return
        old, new = sorted((self.equal.get(first, first), self.equal.get(second, second)), reverse=True)
        self.equal.update({name: new for name, other in self.equal.items() if other == old} | {old: new, new: new})
        self.equal[first] = self.equal[second] = new

    def find(self, column: exp.Column, merge: bool = True) -> Any:
        """Name of a column with that of its table, or a text that stands in double quotes."""
        name = "*" if isinstance(column.this, exp.Star) else column.name.lower()
        table = column.table.lower()
        scope: _Scope | None = self
        while scope is not None:
            for alias, (owner, columns) in scope.sources.items():
                if alias == table or (not table and name in columns):
                    found = f"{owner}.{name}"
                    return scope.equal.get(found, found) if merge else found
            scope = scope.outer
        if not table and name in self.projections:
            return _describe_expression(self.projections[name], self, merge)
        if not table and column.this.args.get("quoted"):
            return ("literal", column.name)
        return f"{table or '?'}.{name}"


def _describe(node: Any, schema: dict[str, Sequence[str]], outer: _Scope | None) -> tuple[Any, ...]:
    """Description of a `SELECT`, or of several that are joined by `UNION` and the like."""
    inner = node.unnest()
    with_clause = inner.args.get("with_")
    named: list[Any] = []
    for table in with_clause.expressions if with_clause else ():
        named.append((table.alias.lower(), _describe(table.this, schema, outer)))
        schema = {**schema, table.alias.lower(): _column_names(table.this)}
    if isinstance(inner, exp.SetOperation):
        sides = [_describe(side, schema, outer) for side in (inner.left, inner.right)]
        leftmost = inner.left.unnest()
        while isinstance(leftmost, exp.SetOperation):
            leftmost = leftmost.left.unnest()
        scope = _Scope(leftmost, schema, outer)
        return (inner.key, bool(inner.args.get("distinct")), *sides, *_describe_end(inner, scope), tuple(named))
    if not isinstance(inner, exp.Select):
        raise NotParsed(f"{inner.sql()!r} is not supported.")
    scope = _Scope(inner, schema, outer)
    group, where, having = (inner.args.get(name) for name in ("group", "where", "having"))
    return (
        "select",
        _in_any_order(_describe_expression(part, scope) for part in inner.expressions),
        _in_any_order(scope.tables),
        scope.conditions,
        _describe_expression(where.this, scope) if where else None,
        _in_any_order(_describe_expression(part, scope) for part in group.expressions) if group else None,
        _describe_expression(having.this, scope) if having else None,
        *_describe_end(inner, scope),
        tuple(named),
    )


def _describe_end(node: exp.Expression, scope: _Scope) -> tuple[Any, ...]:
    """`ORDER BY`, where order counts, and whether there are `LIMIT` and `OFFSET`."""
    order = node.args.get("order")
    terms = []
    for term in order.expressions if order else ():
        column = term.this
        if isinstance(column, exp.Column) and not column.table and column.name.lower() in scope.projections:
            column = scope.projections[column.name.lower()]  # here, new names go before those of columns
        terms.append((_describe_expression(column, scope), bool(term.args.get("desc"))))
    return tuple(terms), node.args.get("limit") is not None, node.args.get("offset") is not None


def _describe_expression(node: Any, scope: _Scope, merge: bool = True) -> Any:
    """Description of what stands in a clause."""

    def describe(part: Any) -> Any:
        return _describe_expression(part, scope, merge)

    def operand(part: Any) -> Any:
        described = describe(part.this if isinstance(part, exp.Neg) else part)
        return _VALUE if isinstance(described, tuple) and described[0] == "literal" else describe(part)

    node = node.unnest() if isinstance(node, exp.Paren) else node
    if isinstance(node, exp.Column):
        return scope.find(node, merge)
    if isinstance(node, (exp.Subquery, exp.Select, exp.SetOperation)):
        return _describe(node, scope.schema, scope)
    if isinstance(node, exp.Alias):
        return describe(node.this)
    if isinstance(node, exp.Literal):
        return ("literal", node.name)
    if isinstance(node, exp.Distinct):
        return tuple(map(describe, node.expressions)) if len(node.expressions) > 1 else describe(node.expressions[0])
    if isinstance(node, (exp.And, exp.Or)):
        return (node.key, *_in_any_order(map(describe, node.flatten())))
    if isinstance(node, (exp.EQ, exp.NEQ)):
        return (node.key, *_in_any_order([operand(node.this), operand(node.expression)]))
    if isinstance(node, (exp.GT, exp.GTE)):  # a > b is b < a
        return _MIRRORED[node.key], operand(node.expression), operand(node.this)
    if isinstance(node, (exp.LT, exp.LTE, exp.Like, exp.Glob)):
        return node.key, operand(node.this), operand(node.expression)
    if isinstance(node, exp.Between):
        return node.key, operand(node.this), operand(node.args["low"]), operand(node.args["high"])
    if isinstance(node, exp.In) and node.expressions:
        return node.key, operand(node.this), *sorted({repr(operand(part)) for part in node.expressions})
    return (
        node.key,
        *((name, _describe_argument(part, describe)) for name, part in sorted(node.args.items()) if part),
    )


def _describe_argument(part: Any, describe: Any) -> Any:
    if isinstance(part, list):
        return tuple(_describe_argument(item, describe) for item in part)
    if isinstance(part, exp.Identifier):
        return part.name.lower()
    return describe(part) if isinstance(part, exp.Expression) else str(part).lower()


def _column_names(query: Any) -> list[str]:
    inner = query.unnest()
    while isinstance(inner, exp.SetOperation):
        inner = inner.left.unnest()
    return [projection.alias_or_name.lower() for projection in inner.expressions]


def _in_any_order(parts: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(sorted(parts, key=repr))
