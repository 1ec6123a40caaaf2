"""Schemas as SQL: SQLite reads in them what they were made from."""

import json
import sqlite3
from contextlib import closing
from dataclasses import replace

import pytest
from pipelines import SHARED, load_example
from schema_sql import Declarations, declarations_of_database, format_tables, read_declarations, read_values


ENTRY = {
    "table_names_original": ["Owner", "pet", "visit log"],
    "column_names_original": [
        *([-1, "*"], [0, "owner_id"], [0, "Name"], [1, "pet id"], [1, "owner_id"], [1, "Order"]),
        *([2, "pet id"], [2, "day"], [2, 'the "vet"'], [2, "paid"]),
    ],
    "column_types": ["text", "number", "text", "number", "number", "others", "number", "time", "text", "boolean"],
    "primary_keys": [1, 3, 6, 7],
    "foreign_keys": [[4, 1], [6, 3]],
}
EXPECTED = """CREATE TABLE Owner (
  owner_id INTEGER PRIMARY KEY, -- 1, 2
  Name TEXT -- 'Ann', 'Bo -- b'
);
CREATE TABLE pet (
  "pet id" INTEGER PRIMARY KEY,
  owner_id INTEGER,
  "Order" TEXT, -- 2.5
  FOREIGN KEY (owner_id) REFERENCES Owner(owner_id)
);
CREATE TABLE "visit log" (
  "pet id" INTEGER,
  day TEXT,
  "the ""vet""\" TEXT,
  paid BOOLEAN,
  PRIMARY KEY ("pet id", day),
  FOREIGN KEY ("pet id") REFERENCES pet("pet id")
);"""
VALUES = {
    ("Owner", "owner_id"): [1, 2],
    ("Owner", "Name"): ["Ann", "Bo\n-- b"],
    ("pet", "Order"): [2.5],
    ("pet", "pet id"): [b"\0"],
}


def read_schema(entry):
    return load_example("spider").read_schema(entry)


def make_database(path, *statements):
    with closing(sqlite3.connect(path)) as connection:
        for statement in statements:
            connection.executescript(statement)
        connection.commit()
    return path


def test_a_schema_as_sql():
    declared = replace(read_declarations(ENTRY), values=VALUES)
    assert format_tables(read_schema(ENTRY), declared) == EXPECTED.replace("Bo -- b", r"Bo\n-- b")
    assert format_tables([("pet", ["name"])], Declarations()) == "CREATE TABLE pet (\n  name\n);"


def test_sqlite_reads_what_was_declared(tmp_path):
    check_that_sqlite_reads_it(ENTRY, VALUES, tmp_path / "made.sqlite")


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "spider").is_dir(), reason="needs the data")
def test_sqlite_reads_what_was_declared_of_the_real_spider(tmp_path):
    for entry in json.loads((SHARED / "spider" / "tables.json").read_text()):
        name, schema = entry["db_id"], read_schema(entry)
        database = SHARED / "spider" / "database" / name / f"{name}.sqlite"
        values = read_values(database, schema, 3) if database.is_file() else {}
        check_that_sqlite_reads_it(entry, values, tmp_path / f"{name}.sqlite")


def check_that_sqlite_reads_it(entry, values, path):
    """The statements make a database with the same schema, types and keys, values being comments."""
    schema, declared = read_schema(entry), read_declarations(entry)
    schema = [(table, columns) for table, columns in schema if table != "sqlite_sequence"]
    make_database(path, format_tables(schema, replace(declared, values=values)))
    spider = load_example("spider")
    assert spider.schema_of_database(path) == schema
    found = declarations_of_database(path, schema)
    names = {(table, column) for table, columns in schema for column in columns}
    assert found.kinds == {name: declared.kinds[name] for name in names}
    assert found.keys == declared.keys and set(found.references) == set(declared.references)


def test_values_of_a_database(tmp_path):
    path = make_database(
        tmp_path / "pets.sqlite",
        'CREATE TABLE pet ("pet id", name)',
        "INSERT INTO pet VALUES (1, 'Rex'), (2, NULL), (2, 'Rex'), (4, CAST(x'ff41' AS TEXT)), (5, 'Tom')",
    )
    before = path.read_bytes()
    values = read_values(path, [("PET", ["pet id", "NAME", "age"]), ("owner", ["name"])], 3)
    assert values == {("PET", "pet id"): [1, 2, 4], ("PET", "NAME"): ["Rex", "\ufffdA", "Tom"]}
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
