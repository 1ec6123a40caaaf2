"""
What a query consists of, clause by clause, in a form that is equal for queries that differ only in how they are
written.

This is the idea of Spider's exact set match (Yu et al., 2018, arXiv 1809.08887). Every node of the parsed query is
described once, by a text of bounded length, so that time and memory grow with the length of the query: a name
`table.column`, a literal with a quote in front of it, or `#` and a digest of what the node consists of.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .sql_parsing import NotParsed, exp, parse_query


_VALUE = "value"
_NODE: Any = getattr(exp, "Expr", None) or getattr(exp, "Expression", None)  # `Expr` is not in every version
_MIRRORED = {"gt": "lt", "gte": "lte"}


def describe_query(query: str, schema: Mapping[str, Sequence[str]]) -> str:
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
        `str`: equal for queries with the same clauses.

    Raises:
        ImportError: if `sqlglot` is not installed.
        NotParsed: if it is not one query, is too long, or is nested too deeply.
    """
    try:
        return _describe(parse_query(query), dict(schema), None)[0]
    except (NotParsed, ImportError):
        raise
    except Exception as error:  # a text that nobody vouches for must not end an evaluation, whatever comes of it
        raise NotParsed(f"{query!r:.200} cannot be parsed: {type(error).__name__}: {error!s:.200}") from error


class _Scope:
    """The names that mean something inside of a `SELECT`."""

    def __init__(self, select: Any, schema: dict[str, Sequence[str]], outer: _Scope | None):
        self.schema, self.outer = schema, outer
        self.sources: dict[str, tuple[str, Sequence[str]]] = {}  # by alias: name of the table, its columns
        self.tables: list[str] = []
        self.projections = {p.alias.lower(): p.this for p in select.expressions if isinstance(p, exp.Alias)}
        self.described: dict[tuple[str, bool], str] = {}  # of `projections`
        self.equal: dict[str, str] = {}
        first, joins = select.args.get("from_"), select.args.get("joins") or []
        if first is not None:
            self._add_source(first.this, "")
        for join in joins:
            self._add_source(join.this, f"{join.method} {join.side}".strip().lower())
        self.conditions = _in_any_order([part for join in joins for part in self._describe_condition(join)])
        self.described.clear()  # from here on, columns that are equal are one

    def _add_source(self, source: Any, kind: str) -> None:
        if isinstance(source, exp.Table) and not source.args.get("joins"):
            name = source.name.lower()
            self.sources[source.alias_or_name.lower()] = name, self.schema.get(name, ())
            self.tables.append(_seal("table", kind, name))
        elif isinstance(source, exp.Subquery) and isinstance(source.this, (exp.Select, exp.SetOperation)):
            self.sources[source.alias_or_name.lower()] = "subquery", _column_names(source.this)
            self.tables.append(_seal("subquery", kind, _describe(source, self.schema, self.outer)[0]))
        else:
            raise NotParsed(f"{source.key!r} after FROM or JOIN is not supported.")

    def _describe_condition(self, join: exp.Join) -> list[str]:
        """What joins two tables, before columns that are equal become one; and makes them so from here on."""
        condition = _unwrap(join.args.get("on"))
        parts = list(condition.flatten()) if isinstance(condition, exp.And) else [condition] if condition else []
        equations = [part for part in map(_unwrap, parts) if isinstance(part, exp.EQ)]
        sides = [[_unwrap(part.this), _unwrap(part.expression)] for part in equations]
        described = [_describe_expression(part, self, merge=False) for part in parts]
        pairs = [
            sorted(self.find(side, merge=False) for side in pair)
            for pair in sides
            if all(isinstance(side, exp.Column) for side in pair)
        ]
        for column in join.args.get("using") or []:
            name = column.name.lower()
            owners = sorted(f"{table}.{name}" for table, columns in self.sources.values() if name in columns)
            described.append(_seal("eq", *owners))
            pairs.append(owners)
        if not join.side:  # an outer join leaves NULL in one of the two
            for pair in pairs:
                if len(pair) == 2 and not any(map(_is_literal, pair)):
                    self._merge(*pair)
        return described

    def _merge(self, first: str, second: str) -> None:
        if first.partition(".")[0] == second.partition(".")[0]:  # of one table joined with itself
            return
        old, new = sorted((self.equal.get(first, first), self.equal.get(second, second)), reverse=True)
        self.equal.update({name: new for name, other in self.equal.items() if other == old} | {old: new, new: new})
        self.equal[first] = self.equal[second] = new

    def find(self, column: exp.Column, merge: bool = True) -> str:
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
            return self.describe_projection(name, merge)
        if not table and column.this.args.get("quoted"):
            return f"'{column.name}"
        return f"{table or '?'}.{name}"

    def describe_projection(self, alias: str, merge: bool = True) -> str:
        """Description of what an alias stands for; inside of itself it is a name that nobody knows."""
        key = alias, merge
        if key not in self.described:
            self.described[key] = f"?.{alias}"
            self.described[key] = _describe_expression(self.projections[alias], self, merge)
        return self.described[key]


def _describe(node: Any, schema: dict[str, Sequence[str]], outer: _Scope | None) -> tuple[str, _Scope]:
    """Description of a `SELECT`, or of several joined by `UNION` and the like; the names that it may order by."""
    inner = node.unnest()
    with_clause = inner.args.get("with_")
    named: list[str] = []
    for table in with_clause.expressions if with_clause else ():
        alias = table.alias.lower()
        named.append(_seal("with", alias, _describe(table.this, schema, outer)[0]))
        schema = {**schema, alias: _column_names(table.this)}
    if isinstance(inner, exp.SetOperation):
        (left, scope), (right, _) = (_describe(side, schema, outer) for side in (inner.left, inner.right))
        clauses = [inner.key, str(bool(inner.args.get("distinct"))), left, right]
    elif isinstance(inner, exp.Select):
        scope = _Scope(inner, schema, outer)
        clauses = _describe_clauses(inner, scope)
    else:
        raise NotParsed(f"{inner.key!r} is not supported.")
    return _seal(*clauses, _describe_end(inner, scope), *named), scope


def _describe_clauses(select: exp.Select, scope: _Scope) -> list[str]:
    group, where, having = (select.args.get(name) for name in ("group", "where", "having"))
    return [
        "select",
        _in_any_order([_describe_expression(part, scope) for part in select.expressions]),
        _in_any_order(scope.tables),
        scope.conditions,
        _describe_expression(where.this, scope) if where else "",
        _in_any_order([_describe_expression(part, scope) for part in group.expressions]) if group else "",
        _describe_expression(having.this, scope) if having else "",
    ]


def _describe_end(node: Any, scope: _Scope) -> str:
    """`ORDER BY`, where order counts, and whether there are `LIMIT` and `OFFSET`."""
    order = node.args.get("order")
    terms = []
    for term in order.expressions if order else ():
        column = term.this
        if isinstance(column, exp.Column) and not column.table and column.name.lower() in scope.projections:
            described = scope.describe_projection(column.name.lower())  # here, new names go before those of columns
        else:
            described = _describe_expression(column, scope)
        terms.append(_seal(described, str(bool(term.args.get("desc")))))
    has_limit, has_offset = (node.args.get(name) is not None for name in ("limit", "offset"))
    return _seal("end", str(has_limit), str(has_offset), *terms)


def _describe_expression(node: Any, scope: _Scope, merge: bool = True) -> str:
    """Description of what stands in a clause. Every part is described once, or twice in the condition of a join."""

    def describe(part: Any) -> str:
        return _describe_expression(part, scope, merge)

    def operand(part: Any) -> str:
        part = _unwrap(part)
        described = describe(part.this if isinstance(part, exp.Neg) else part)
        if _is_literal(described):
            return _VALUE
        return _seal("neg", described) if isinstance(part, exp.Neg) else described

    node = _unwrap(node)
    if isinstance(node, exp.Column):
        return scope.find(node, merge)
    if isinstance(node, (exp.Subquery, exp.Select, exp.SetOperation)):
        return _describe(node, scope.schema, scope)[0]
    if isinstance(node, exp.Alias):
        return describe(node.this)
    if isinstance(node, exp.Literal):
        return f"'{node.name}"
    if isinstance(node, exp.Distinct) and len(node.expressions) == 1:
        return describe(node.expressions[0])
    if isinstance(node, (exp.And, exp.Or)):
        return _seal(node.key, _in_any_order([describe(part) for part in node.flatten()]))
    if isinstance(node, (exp.EQ, exp.NEQ)):
        return _seal(node.key, *sorted((operand(node.this), operand(node.expression))))
    if isinstance(node, (exp.GT, exp.GTE)):  # a > b is b < a
        return _seal(_MIRRORED[node.key], operand(node.expression), operand(node.this))
    if isinstance(node, (exp.LT, exp.LTE, exp.Like, exp.Glob)):
        described = _seal(node.key, operand(node.this), operand(node.expression))
        return _seal("not", described) if node.args.get("negate") else described  # of NOT LIKE
    if isinstance(node, exp.Between):
        return _seal(node.key, operand(node.this), operand(node.args["low"]), operand(node.args["high"]))
    if isinstance(node, exp.In) and node.expressions:
        return _seal(node.key, operand(node.this), *sorted({operand(part) for part in node.expressions}))
    return _seal(
        node.key,
        *(_seal(name, _describe_argument(part, describe)) for name, part in sorted(node.args.items()) if part),
    )


def _describe_argument(part: Any, describe: Any) -> str:
    if isinstance(part, list):
        return _seal(*(_describe_argument(item, describe) for item in part))
    if isinstance(part, exp.Identifier):
        return part.name.lower()
    return describe(part) if isinstance(part, _NODE) else str(part).lower()


def _column_names(query: Any) -> list[str]:
    inner = query.unnest()
    while isinstance(inner, exp.SetOperation):
        inner = inner.left.unnest()
    return [projection.alias_or_name.lower() for projection in inner.expressions]


def _unwrap(node: Any) -> Any:
    return node.unnest() if isinstance(node, exp.Paren) else node


def _is_literal(description: str) -> bool:
    return description.startswith("'")


def _in_any_order(parts: Iterable[str]) -> str:
    return _seal(*sorted(parts))


def _seal(*parts: str) -> str:
    """One text of bounded length for several."""
    return "#" + hashlib.sha256(repr(parts).encode(errors="surrogatepass")).hexdigest()
