"""Made-up problems of the Spider example: every query answers on its own schema, and on nothing else."""

import json
import re
import sqlite3
from contextlib import closing
from dataclasses import replace

import pytest
from pipelines import load_example, write_spider


ENTRIES = [
    {
        "db_id": "pets",
        "table_names_original": ["Owner", "pet", "sqlite_sequence", "Visit", "vet", "one"],
        "table_names": ["owner", "pet", "sqlite sequence", "visit", "vet", "one"],
        "column_names_original": [
            [-1, "*"],
            *([0, name] for name in ("Owner_ID", "Name", "city", "Home Town")),
            *([1, name] for name in ("pet_id", "name", "Weight", "Birth_Year", "breed", "colour")),
            *([2, name] for name in ("name", "seq")),
            *([3, name] for name in ("visit_id", "date_of_visit", "Cost")),
            *([4, name] for name in ("vet_id", "Name", "phone", "Salary")),
            [5, "alone"],
        ],
    }
]
ENTRIES[0]["column_names"] = [
    [table, name.lower().replace("_", " ")] for table, name in ENTRIES[0]["column_names_original"]
]
ENTRIES[0]["column_types"] = [
    "number" if re.search("(?i)id$|weight|year|cost|salary|seq", name) else "text"
    for _, name in ENTRIES[0]["column_names_original"]
]


@pytest.fixture(scope="module")
def module():
    return load_example("made_up_sql")


def test_only_names_that_need_no_quotes_are_taken(module):
    tables = module.read_tables(ENTRIES)
    assert [table.name for table in tables] == ["Owner", "pet", "Visit", "vet"]
    assert [column.name for column in tables[0].columns] == ["Owner_ID", "Name", "city"]
    assert tables[1].columns[2] == module.Column("Weight", "weight", True) and not tables[1].columns[1].is_number


def test_every_query_runs_on_a_database_of_its_schema(module):
    problems = module.make_problems(module.read_tables(ENTRIES), 1500, seed=3)
    queries = set()
    for problem in problems:
        names = [table.name.lower() for table in problem.tables]
        assert len(set(names)) == len(names) and 1 <= len(names) <= 4
        with closing(sqlite3.connect(":memory:")) as connection:
            for table in problem.tables:
                columns = [column.name for column in table.columns]
                assert len({column.lower() for column in columns}) == len(columns) >= 2
                connection.execute(f"CREATE TABLE {table.name} ({', '.join(columns)})")
            connection.execute(problem.query)
        assert problem.question[-1] in ".?" and "{" not in problem.question
        queries.add(re.sub(r"\d+|\b(?!SELECT|FROM|WHERE|GROUP|ORDER|JOIN|NOT|count|avg)\w+", "_", problem.query))
    kinds = ("GROUP BY", "HAVING", "JOIN", "NOT IN", "LIMIT 1", "DISTINCT", "avg(", " OR ", " AND ", "LIKE", "DESC")
    assert all(any(kind in problem.query for problem in problems) for kind in kinds) and len(queries) > 15


def test_some_names_are_new_ones_that_need_no_quotes(module):
    """Words that are reserved in SQL are the worst case."""
    table = module.Table("t", "t", tuple(module.Column(name, "order", False) for name in ("a", "b", "c")))
    tables = [replace(table, name=f"t{number}", words="select from") for number in range(4)]
    old, new = {"a", "b", "c", *(one.name for one in tables)}, set()
    for problem in module.make_problems(tables, 400, seed=3):
        with closing(sqlite3.connect(":memory:")) as connection:
            for table in problem.tables:
                columns = [column.name for column in table.columns]
                connection.execute(f"CREATE TABLE {table.name} ({', '.join(columns)})")
                new |= {table.name, *columns} - old
            connection.execute(problem.query)
    assert len(new) > 50


def test_texts_in_double_quotes_are_no_columns(module):
    for problem in module.make_problems(module.read_tables(ENTRIES), 1500, seed=5):
        used = {table.name for table in problem.tables if re.search(rf"\b{table.name}\b", problem.query)}
        own = {column.name.lower() for table in problem.tables if table.name in used for column in table.columns}
        assert not {text.lower() for text in re.findall(r'"([^"]*)"', problem.query)} & own


def test_the_seed_alone_decides(module):
    tables = module.read_tables(ENTRIES)
    assert module.make_problems(tables, 30, seed=1) == module.make_problems(tables, 30, seed=1)
    assert module.make_problems(tables, 30, seed=1) != module.make_problems(tables, 30, seed=2)
    assert module.make_problems(tables, 30, seed=1)[:10] == module.make_problems(tables, 10, seed=1)


def test_training_problems_have_them_and_test_problems_do_not(tmp_path):
    data, spider = write_spider(tmp_path / "data"), load_example("spider")
    plain = spider.Spider(data=str(data)).load("train")
    with pytest.raises(ValueError, match="at least 4 tables of training databases, got"):
        spider.Spider(data=str(data), made_up=5).load("train")
    entries = json.loads((data / "tables.json").read_text())
    (data / "tables.json").write_text(json.dumps([*ENTRIES, *entries[1:]]))
    task = spider.Spider(data=str(data), made_up=5)
    problems = task.load("train")
    assert len(problems) == len(plain) + 5 and len(task.load("test")) == 5
    assert all(re.search(r":.*\n.+\n$", problem.prompt) for problem in problems[-5:])
