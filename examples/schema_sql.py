"""A schema as SQL, with types, keys and some values: what an instruct model is told of a database."""

import re
import sqlite3
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from made_up_sql import RESERVED


Schema = list[tuple[str, list[str]]]  # tables and their columns
Name = tuple[str, str]  # of a table, and of its column
_KINDS = {"number": "INTEGER", "boolean": "BOOLEAN"}  # the others are texts
_LONGEST_VALUE = 30


@dataclass(frozen=True)
class Declarations:
    """
    What SQL declares of the columns of a database.

    Attributes:
        kinds (`Mapping[Name, str]`): types, such as `"INTEGER"`.
        keys (`frozenset[Name]`): columns of primary keys.
        references (`tuple[tuple[Name, Name], ...]`): columns and those that they refer to.
        values (`Mapping[Name, list[Any]]`): some values.
    """

    kinds: Mapping[Name, str] = field(default_factory=dict)
    keys: frozenset[Name] = frozenset()
    references: tuple[tuple[Name, Name], ...] = ()
    values: Mapping[Name, list[Any]] = field(default_factory=dict)


def read_declarations(entry: Mapping[str, Any]) -> Declarations:
    """Declarations of an entry of Spider's `tables.json`, without values."""
    tables = entry["table_names_original"]
    names = [(tables[table], column) for table, column in entry["column_names_original"]]
    return Declarations(
        {name: _KINDS.get(kind, "TEXT") for name, kind in zip(names, entry["column_types"])},
        frozenset(names[index] for index in entry.get("primary_keys", ())),
        tuple((names[one], names[other]) for one, other in entry.get("foreign_keys", ())),
    )


def declarations_of_database(path: Path, schema: Schema) -> Declarations:
    """Declarations of a database file, which is not changed, without values."""
    kinds, keys, references = {}, set(), []
    with closing(open_database(path)) as connection:
        for table, _ in schema:
            for column, kind, key in connection.execute("SELECT name, type, pk FROM pragma_table_info(?)", (table,)):
                kinds[table, column] = kind
                keys |= {(table, column)} if key else set()
            query = 'SELECT "from", "table", "to" FROM pragma_foreign_key_list(?)'
            found = connection.execute(query, (table,)).fetchall()
            references += [((table, column), (other, to)) for column, other, to in found if to is not None]
    return Declarations(kinds, frozenset(keys), tuple(references))


def read_values(path: Path, schema: Schema, count: int) -> dict[Name, list[Any]]:
    """The first distinct values of each column of a database file that has it, at most `count`."""
    values = {}
    with closing(open_database(path)) as connection:
        for table, columns in schema:
            for column in columns:
                owner = _always_quoted(table)
                name = f"{owner}.{_always_quoted(column)}"  # alone, an unknown name in quotes would be a text
                query = f"SELECT DISTINCT {name} FROM {owner} WHERE {name} IS NOT NULL LIMIT {count}"
                try:
                    values[table, column] = [value for (value,) in connection.execute(query)]
                except sqlite3.Error:  # `tables.json` may name what the file does not have
                    continue
    return values


def open_database(path: Path) -> sqlite3.Connection:
    """Open a database file so that neither it nor its folder changes; bytes that are no text are replaced."""
    connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro&immutable=1", uri=True)
    connection.text_factory = lambda content: content.decode(errors="replace")
    return connection


def format_tables(schema: Schema, declared: Declarations) -> str:
    """A schema as SQL, a column a line with its values as a comment, without SQLite's own tables."""
    own = [(table, columns) for table, columns in schema if not table.startswith("sqlite_")]
    return "\n".join(_format_table(table, columns, declared) for table, columns in own)


def _format_table(table: str, columns: list[str], declared: Declarations) -> str:
    keys = [column for column in columns if (table, column) in declared.keys]
    lines = [_format_column((table, column), declared, is_key=keys == [column]) for column in columns]
    comments = [_comment(declared.values.get((table, column), ())) for column in columns]
    if len(keys) > 1:
        lines.append(f"PRIMARY KEY ({', '.join(map(_quoted, keys))})")
    for (owner, column), (other, to) in declared.references:
        if owner == table:
            lines.append(f"FOREIGN KEY ({_quoted(column)}) REFERENCES {_quoted(other)}({_quoted(to)})")
    body = [
        f"  {line}{',' * (number < len(lines))}{comment}"
        for number, (line, comment) in enumerate(zip_longest(lines, comments, fillvalue=""), 1)
    ]
    return "\n".join([f"CREATE TABLE {_quoted(table)} (", *body, ");"])


def _format_column(name: Name, declared: Declarations, is_key: bool) -> str:
    parts = (_quoted(name[1]), declared.kinds.get(name, ""), "PRIMARY KEY" if is_key else "")
    return " ".join(part for part in parts if part)


def _comment(values: Iterable[Any]) -> str:
    shown = [re.sub(r"\s+", " ", repr(value))[:_LONGEST_VALUE] for value in values if not isinstance(value, bytes)]
    return f" -- {', '.join(shown)}" if shown else ""


def _quoted(name: str) -> str:
    is_plain = re.fullmatch(r"[A-Za-z_]\w*", name) is not None and name.lower() not in RESERVED
    return name if is_plain else _always_quoted(name)


def _always_quoted(name: str) -> str:
    return '"{}"'.format(name.replace('"', '""'))
