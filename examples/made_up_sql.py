"""
Made-up questions about made-up databases, from which a small model learns to read a schema.

A model from scratch that only sees the 140 training databases of Spider remembers their names, and writes them
whatever schema stands in its prompt. Here every problem has a schema of its own, put together from tables of the
training databases, with columns mixed in from others, and some names replaced by new ones of known and made-up words;
a name can only be had from the prompt. Questions and queries are from templates, in the words of Spider.
"""

import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any


# What SQLite does not take as a name without quotes.
RESERVED = frozenset(
    "add all alter and as autoincrement between case check collate commit constraint create default deferrable delete "
    "distinct drop else escape except exists foreign from group having in index insert intersect into is isnull join "
    "limit not nothing notnull null on or order primary references returning select set table then to transaction "
    "union unique update using values when where".split()
)


@dataclass(frozen=True)
class Column:
    """A column: its name in the database, how a question calls it, and whether it holds numbers."""

    name: str
    words: str
    is_number: bool


@dataclass(frozen=True)
class Table:
    """A table: its name in the database, how a question calls it, and its columns."""

    name: str
    words: str
    columns: tuple[Column, ...]

    @property
    def plural(self) -> str:
        """How a question calls its rows."""
        return self.words if self.words.endswith("s") else f"{self.words}s"


@dataclass(frozen=True)
class MadeUp:
    """A problem: the tables of its schema, a question and the query that answers it."""

    tables: tuple[Table, ...]
    question: str
    query: str


def read_tables(entries: Iterable[dict[str, Any]]) -> list[Table]:
    """Tables of at least two columns, of entries of Spider's `tables.json`; names that need quotes are left out."""
    found = []
    for entry in entries:
        columns: list[list[Column]] = [[] for _ in entry["table_names_original"]]
        for (table, name), (_, words), kind in zip(
            entry["column_names_original"], entry["column_names"], entry["column_types"]
        ):
            if table >= 0 and _is_plain(name):  # the columns of `*` are of table -1
                columns[table].append(Column(name, words, kind == "number"))
        for name, words, own in zip(entry["table_names_original"], entry["table_names"], columns):
            if len(own) >= 2 and _is_plain(name):
                found.append(Table(name, words, tuple(own)))
    return found


def _is_plain(name: str) -> bool:
    return re.fullmatch(r"(?!sqlite_)[A-Za-z_]\w*", name) is not None


def make_problems(tables: list[Table], count: int, seed: int) -> list[MadeUp]:
    """
    Make problems.

    Args:
        tables (`list[Table]`): what schemas are put together from, at least four.
        count (`int`): how many.
        seed (`int`): the same seed and tables give the same problems.
    """
    rng = random.Random(seed)
    named = [word for table in tables for column in table.columns for word in column.words.split()]
    words = [word for word in named if len(word) >= 3 and word.isascii() and word.isalpha()]
    return [_make_problem(tables, words, rng) for _ in range(count)]


def _make_problem(tables: list[Table], words: list[str], rng: random.Random) -> MadeUp:
    chosen = _rename(_draw_schema(tables, rng), words, rng)
    key = None
    if len(chosen) > 1 and rng.random() < 0.8:
        chosen, key = _join_two(chosen, rng)
    chosen = [replace(table, columns=tuple(rng.sample(table.columns, len(table.columns)))) for table in chosen]
    if key is not None and rng.random() < 0.4:
        ends = [table for table in chosen if key in table.columns]
        draw = _Draw(rng, words, *rng.sample(ends, 2), key)
        template = rng.choice(_ON_TWO_TABLES)
    else:
        draw = _Draw(rng, words, rng.choice(chosen))
        template = rng.choice(_ON_ONE_TABLE)
    question, query = template(draw)
    rng.shuffle(chosen)
    return MadeUp(tuple(chosen), question, query)


def _draw_schema(tables: list[Table], rng: random.Random) -> list[Table]:
    """One to four tables without two of a name; some have a column of another one."""
    chosen = {table.name.lower(): table for table in rng.sample(tables, rng.choice((1, 2, 2, 3, 3, 4)))}
    return [_draw_columns(table, tables, rng) for table in chosen.values()]


def _draw_columns(table: Table, tables: list[Table], rng: random.Random) -> Table:
    columns = list(table.columns)
    if rng.random() < 0.5:
        columns.append(rng.choice(rng.choice(tables).columns))
    distinct = list({column.name.lower(): column for column in columns}.values())
    count = min(rng.randint(2, 9), len(distinct))
    return replace(table, columns=tuple(rng.sample(distinct, max(count, min(2, len(distinct))))))


def _rename(tables: list[Table], words: list[str], rng: random.Random) -> list[Table]:
    """The same tables; in one of four schemas about half of the names are replaced by new ones."""
    share = rng.choice((0.0, 0.0, 0.0, 0.5))

    def rename(one: Any) -> Any:
        if rng.random() >= share:
            return one
        name, called = _new_name(words, rng)
        return replace(one, name=name, words=called)

    named: dict[str, Table] = {}
    for table in map(rename, tables):
        columns = {column.name.lower(): column for column in map(rename, table.columns)}
        if len(columns) >= 2:
            named[table.name.lower()] = replace(table, columns=tuple(columns.values()))
    return list(named.values()) or tables


def _new_name(words: list[str], rng: random.Random) -> tuple[str, str]:
    """A name of one to three words, and how a question calls it. A word is known, or the ends of two known ones."""
    parts = []
    for _ in range(rng.choice((1, 2, 2, 3))):
        start, end = rng.choice(words).lower(), rng.choice(words).lower()
        parts.append(start if rng.random() < 0.5 else start[: rng.randint(2, 4)] + end[-rng.randint(2, 4) :])
    name = rng.choice(("_".join(parts), "_".join(parts).capitalize(), "".join(part.title() for part in parts)))
    # Three names, such as `Order`, would need quotes.
    return (f"{name}_{rng.choice(('name', 'code'))}" if name.lower() in RESERVED else name), " ".join(parts)


def _join_two(tables: list[Table], rng: random.Random) -> tuple[list[Table], Column]:
    """The tables, of which two now share a key."""
    first, second = rng.sample(range(len(tables)), 2)
    owner = tables[first]
    key = Column(owner.name + rng.choice(("_ID", "_id")), f"id of {owner.words}", True)
    joined = list(tables)
    for number in (first, second):
        others = [column for column in joined[number].columns if column.name.lower() != key.name.lower()]
        joined[number] = replace(joined[number], columns=(key, *others))
    return joined, key


class _Draw:
    """What a template is filled with: a table, perhaps one that is joined with it, and random choices of them."""

    def __init__(
        self,
        rng: random.Random,
        words: list[str],
        table: Table,
        other: Table | None = None,
        key: Column | None = None,
    ):
        self.rng, self.words, self.table, self.key = rng, words, table, key
        self.other = other or table
        self.one = self.column(table)
        self.two = self.column(table, but=self.one)
        self.far = self.column(self.other)
        on = "" if key is None else f"T1.{key.name} = T2.{key.name}"
        self.join = f"{table.name} AS T1 JOIN {self.other.name} AS T2 ON {on}"
        self.ask = rng.choice(
            ("What are the", "Show the", "List the", "Find the", "Give the", "Return the", "Show all")
        )
        self.of = rng.choice(("of all", "of", "of the", "for all"))

    def pick(self, *choices: Any) -> Any:
        return self.rng.choice(choices)

    def column(self, table: Table, but: Column | None = None) -> Column:
        """A column that is neither the key nor `but`, where there is one."""
        free = [column for column in table.columns if column not in (self.key, but)]
        return self.rng.choice(free or list(table.columns))

    def call(self, column: Column) -> str:
        """What a question calls a column: now and then by its name in the database."""
        return column.words if self.rng.random() < 0.8 else column.name

    def condition(self, table: Table, prefix: str = "") -> tuple[str, str]:
        """A condition on a column of a table, in words and in SQL."""
        column = self.column(table)
        words = self.call(column)
        if column.is_number:
            value = self.pick(self.rng.randint(1, 20), self.rng.randint(20, 3000))
            relation, sign = self.pick(
                ("more than", ">"),
                ("above", ">"),
                ("less than", "<"),
                ("below", "<"),
                ("equal to", "="),
                ("at least", ">="),
            )
            return f"{words} {self.pick('is ', '')}{relation} {value}", f"{prefix}{column.name} {sign} {value}"
        value = " ".join(self.rng.sample(self.words, self.pick(1, 1, 2)))
        value = value.title() if self.rng.random() < 0.6 else value
        if self.rng.random() < 0.2:
            return f"{words} contains {value}", f"{prefix}{column.name} LIKE '%{value}%'"
        names = {known.name.lower() for table in (self.table, self.other) for known in table.columns}
        quote = "'" if value.lower() in names else self.pick('"', "'")  # in double quotes a name would be that column
        return f"{words} {self.pick('is ', 'equal to ', '')}{value}", f"{prefix}{column.name} = {quote}{value}{quote}"


_AGGREGATES = (("average", "avg"), ("maximum", "max"), ("minimum", "min"), ("total", "sum"))
_Template = Callable[[_Draw], tuple[str, str]]


def _count(d: _Draw) -> tuple[str, str]:
    question = d.pick("How many {} are there?", "Count the number of {}.", "What is the total number of {}?")
    return question.format(d.table.plural), f"SELECT count(*) FROM {d.table.name}"


def _select(d: _Draw) -> tuple[str, str]:
    question = f"{d.ask} {d.call(d.one)} and {d.call(d.two)} {d.of} {d.table.plural}."
    return question, f"SELECT {d.one.name}, {d.two.name} FROM {d.table.name}"


def _distinct(d: _Draw) -> tuple[str, str]:
    is_distinct = d.pick(True, False)
    question = f"{d.ask} {'different ' if is_distinct else ''}{d.call(d.one)} {d.of} {d.table.plural}."
    return question, f"SELECT {'DISTINCT ' if is_distinct else ''}{d.one.name} FROM {d.table.name}"


def _where(d: _Draw) -> tuple[str, str]:
    words, condition = d.condition(d.table)
    question = f"{d.ask} {d.call(d.one)} {d.of} {d.table.plural} whose {words}."
    return question, f"SELECT {d.one.name} FROM {d.table.name} WHERE {condition}"


def _count_where(d: _Draw) -> tuple[str, str]:
    words, condition = d.condition(d.table)
    return f"How many {d.table.plural} have {words}?", f"SELECT count(*) FROM {d.table.name} WHERE {condition}"


def _where_two(d: _Draw) -> tuple[str, str]:
    (words, condition), (more_words, more), link = d.condition(d.table), d.condition(d.table), d.pick("and", "or")
    question = f"{d.ask} {d.call(d.one)} {d.of} {d.table.plural} whose {words} {link} {more_words}."
    return question, f"SELECT {d.one.name} FROM {d.table.name} WHERE {condition} {link.upper()} {more}"


def _order(d: _Draw) -> tuple[str, str]:
    how, order = d.pick(("", ""), (" in ascending order", " ASC"), (" in descending order", " DESC"))
    question = (
        f"{d.ask} {d.call(d.one)} {d.of} {d.table.plural} {d.pick('ordered', 'sorted')} by {d.call(d.two)}{how}."
    )
    return question, f"SELECT {d.one.name} FROM {d.table.name} ORDER BY {d.two.name}{order}"


def _superlative(d: _Draw) -> tuple[str, str]:
    most, order = d.pick(("highest", " DESC"), ("largest", " DESC"), ("lowest", ""), ("smallest", ""))
    question = f"What is the {d.call(d.one)} of the {d.table.words} with the {most} {d.call(d.two)}?"
    return question, f"SELECT {d.one.name} FROM {d.table.name} ORDER BY {d.two.name}{order} LIMIT 1"


def _aggregate(d: _Draw) -> tuple[str, str]:
    (words, function), column = d.pick(*_AGGREGATES), d.call(d.one)
    return (
        f"What is the {words} {column} {d.of} {d.table.plural}?",
        f"SELECT {function}({d.one.name}) FROM {d.table.name}",
    )


def _two_aggregates(d: _Draw) -> tuple[str, str]:
    (words, function), (more_words, more) = d.rng.sample(_AGGREGATES, 2)
    question = f"What are the {words} and {more_words} {d.call(d.one)} {d.of} {d.table.plural}?"
    return question, f"SELECT {function}({d.one.name}), {more}({d.one.name}) FROM {d.table.name}"


def _group(d: _Draw) -> tuple[str, str]:
    question = d.pick("How many {rows} are there for each {one}?", "Show each {one} and the number of its {rows}.")
    query = f"SELECT {d.one.name}, count(*) FROM {d.table.name} GROUP BY {d.one.name}"
    return question.format(rows=d.table.plural, one=d.call(d.one)), query


def _having(d: _Draw) -> tuple[str, str]:
    least = d.rng.randint(1, 5)
    query = f"SELECT {d.one.name} FROM {d.table.name} GROUP BY {d.one.name} HAVING count(*) > {least}"
    return f"Which {d.call(d.one)} have more than {least} {d.table.plural}?", query


def _join(d: _Draw) -> tuple[str, str]:
    question = f"{d.ask} {d.call(d.one)} of {d.table.plural} and the {d.call(d.far)} of their {d.other.plural}."
    return question, f"SELECT T1.{d.one.name}, T2.{d.far.name} FROM {d.join}"


def _join_where(d: _Draw) -> tuple[str, str]:
    words, condition = d.condition(d.other, "T2.")
    question = f"{d.ask} {d.call(d.one)} of {d.table.plural} whose {d.other.words} has {words}."
    return question, f"SELECT T1.{d.one.name} FROM {d.join} WHERE {condition}"


def _join_group(d: _Draw) -> tuple[str, str]:
    question = f"Show the number of {d.other.plural} for each {d.table.words} {d.call(d.one)}."
    return question, f"SELECT T1.{d.one.name}, count(*) FROM {d.join} GROUP BY T1.{d.one.name}"


def _join_most(d: _Draw) -> tuple[str, str]:
    assert d.key is not None
    question = f"Which {d.table.words} has the most {d.other.plural}? Give its {d.call(d.one)}."
    query = f"SELECT T1.{d.one.name} FROM {d.join} GROUP BY T1.{d.key.name} ORDER BY count(*) DESC LIMIT 1"
    return question, query


def _not_in(d: _Draw) -> tuple[str, str]:
    assert d.key is not None
    question = f"{d.ask} {d.call(d.one)} of {d.table.plural} that have no {d.other.words}."
    inner = f"SELECT {d.key.name} FROM {d.other.name}"
    return question, f"SELECT {d.one.name} FROM {d.table.name} WHERE {d.key.name} NOT IN ({inner})"


_ON_ONE_TABLE: tuple[_Template, ...] = (
    _count,
    _select,
    _distinct,
    _where,
    _where,
    _count_where,
    _where_two,
    _order,
    _superlative,
    _aggregate,
    _two_aggregates,
    _group,
    _having,
)
_ON_TWO_TABLES: tuple[_Template, ...] = (_join, _join_where, _join_where, _join_group, _join_most, _not_in)
