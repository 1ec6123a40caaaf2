"""
Spider: questions about databases, answered in SQL.

    python examples/spider.py all --data ../shared/data/spider
    python examples/spider.py all --config examples/configs/spider-gpu.yaml --databases spider_data/database

Steps: `sft` (target model), `collect` (its trajectories), `train` (the CLLM), `evaluate` (the table), or `all`. Each
goes on where it was interrupted. The data are a folder with `train.json`, `dev.json`, `tables.json` and
`database/DB_ID/DB_ID.sqlite`, or `xlangai/spider` from the Hub, which has no databases: `--databases` names their
folder. A prompt is the schema of a database and a question:

    singer:singer_id,name,country|concert:concert_id,singer_id,year
    How many singers do we have?

With `chat`, it is a message that has the schema as SQL, and says what is wanted.
"""

import random
import re
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from datasets import load_dataset
from made_up_sql import make_problems, read_tables
from schema_sql import (
    Declarations,
    Schema,
    declarations_of_database,
    format_tables,
    open_database,
    read_declarations,
    read_values,
)
from tasks.command import main
from tasks.data import read_json, read_json_rows
from tasks.task import Problem, Task, task_option

from cllm_hf.evaluation.judgements import Judgement


# What a chat message says between the schema and the question.
_INSTRUCTION = (
    "Write one SQLite query that answers the question. Reply with the query alone. "
    "Use only the tables and columns above."
)


@dataclass
class Spider(Task):
    """
    A query is right if it returns what the query in the data returns. Without databases it must have the same clauses,
    which takes the package `sqlglot`.
    """

    name = "spider"
    title = "Spider"
    source = "xlangai/spider"
    license = "cc-by-sa-4.0"
    places = ("data", "databases")

    databases: str | None = task_option(
        None, "folder with DB_ID/DB_ID.sqlite for each database; by default `database` in `data`"
    )
    chat: bool = task_option(False, "whether prompts are chat messages, for an instruct model")
    example_values: int = task_option(
        0, "values of each column that a chat message shows, of training databases and test databases that are there"
    )
    lower_case: bool = task_option(
        False,
        "whether schemas and queries are in lower case, but for what is quoted: SQL takes names in either case, and a "
        "small model has fewer to learn",
    )
    schema_shuffles: int = task_option(
        0,
        "copies of the training data, each with tables and columns in other orders, so that a small model learns to "
        "read the schema; 0 for one copy in the order of the data",
    )
    made_up: int = task_option(
        0,
        "made-up problems beside the training data, each with a schema of its own, for a model from scratch; takes "
        "`tables.json`",
    )
    max_prompt_chars: int | None = task_option(
        None, "longest prompt of a training problem, in characters; no test problem is left out"
    )

    def load(self, split: str) -> list[Problem]:
        """Load the problems of `"train"` or `"test"`, which is the development set: no other has databases."""
        rows = {name: self._rows(name) for name in ("train", "dev")}
        check_split(rows["train"], rows["dev"])
        if split == "test":
            self._check_databases({row["db_id"] for row in rows["dev"]})
            return [self._problem(row, self._schema(row["db_id"])) for row in rows["dev"]]
        rng = random.Random(self.seed)
        problems = []
        for _ in range(max(self.schema_shuffles, 1)):
            for row in rows["train"]:
                schema = self._schema(row["db_id"])
                problems.append(self._problem(row, shuffle_schema(schema, rng) if self.schema_shuffles else schema))
        problems += self._make_up({row["db_id"] for row in rows["train"]})
        longest = self.max_prompt_chars
        return [one for one in problems if longest is None or len(_text_of(one.prompt)) <= longest]

    def judge(self, responses: list[str], problems: Sequence[Problem]) -> list[Judgement]:
        """Execute both queries, or compare their clauses where there is no database."""
        from metrics.spider_accuracy.spider import judge_exact_match, judge_sql
        from metrics.spider_accuracy.sql import QueryRunner

        def judge_one(response: str, row: dict[str, str]) -> Judgement:
            database = self._database(row["db_id"])
            if database is not None:
                return judge_sql(response, row["query"], database, runner)
            schema = {name.lower(): [column.lower() for column in own] for name, own in self._schema(row["db_id"])}
            return judge_exact_match(response, row["query"], schema)

        with QueryRunner() as runner:
            return [judge_one(response, problem.reference) for response, problem in zip(responses, problems)]

    @property
    def judged_by(self) -> str:
        """`str`: `"execution"`, or `"clauses"` without databases."""
        has_databases = any(self._database(row["db_id"]) is not None for row in self._rows("dev"))
        return "execution" if has_databases else "clauses"

    def _check_databases(self, names: set[str]) -> None:
        """All or none, so that one metric judges all answers."""
        missing = sorted(name for name in names if self._database(name) is None)
        if missing and (self.databases is not None or len(missing) < len(names)):
            raise ValueError(
                f"There must be a file DB_ID/DB_ID.sqlite for each of the {len(names)} databases of the test "
                f"problems, got none for {len(missing)}, such as {missing[0]!r}. Name their folder with `--databases`."
            )

    def _rows(self, name: str) -> list[dict[str, str]]:
        if self.data is None:
            return list(load_dataset("xlangai/spider", split={"train": "train", "dev": "validation"}[name]))
        return read_json_rows(Path(self.data) / f"{name}.json", ("db_id", "question", "query"))

    def _make_up(self, databases: set[str]) -> list[Problem]:
        """Problems over schemas that are put together from tables of the training databases."""
        if not self.made_up:
            return []
        tables = read_tables(entry for entry in self._entries if entry["db_id"] in databases)
        if len(tables) < 4:
            raise ValueError(
                f"`made_up` takes a `tables.json` with at least 4 tables of training databases, got {len(tables)}. "
                "Put it into `data`, or beside or in `databases`."
            )
        return [
            self._problem(
                {"question": one.question, "query": one.query, "db_id": ""},
                [(table.name, [column.name for column in table.columns]) for table in one.tables],
            )
            for one in make_problems(tables, self.made_up, self.seed)
        ]

    def _problem(self, row: dict[str, str], schema: Schema) -> Problem:
        question = row["question"].strip()
        tables = format_tables(schema, self._declared(row["db_id"])) if self.chat else format_schema(schema)
        tables = tables.lower() if self.lower_case else tables
        prompt: Any = f"{tables}\n{question}\n"
        if self.chat:
            prompt = [{"role": "user", "content": f"{tables}\n\n{_INSTRUCTION}\n\nQuestion: {question}"}]
        return Problem(prompt, normalize_sql(row["query"], self.lower_case), reference=row)

    def _database(self, name: str) -> Path | None:
        folder = self.databases or (self.data and str(Path(self.data) / "database"))
        path = Path(folder) / name / f"{name}.sqlite" if folder else None
        return path if path is not None and path.is_file() else None

    @cached_property
    def _entries(self) -> list[dict[str, Any]]:
        """Of `tables.json`, or none without that."""
        places = [Path(place) / "tables.json" for place in (self.data, self.databases) if place is not None]
        if self.databases is not None:
            places.append(Path(self.databases).parent / "tables.json")
        found = next((path for path in places if path.is_file()), None)
        return [] if found is None else read_json(found)

    @cached_property
    def _schemas(self) -> dict[str, Schema]:
        return {entry["db_id"]: read_schema(entry) for entry in self._entries}

    def _schema(self, name: str) -> Schema:
        if name not in self._schemas:
            database = self._database(name)
            if database is None:
                raise ValueError(
                    f"The prompt needs the schema of the database {name!r}, got neither `tables.json` nor its file. "
                    "Download both from https://yale-lily.github.io/spider, and pass `--data` or `--databases`."
                )
            self._schemas[name] = schema_of_database(database)
        return self._schemas[name]

    @cached_property
    def _declarations(self) -> dict[str, Declarations]:
        return {}  # filled as they are asked for

    @cached_property
    def _entries_by_name(self) -> dict[str, dict[str, Any]]:
        return {entry["db_id"]: entry for entry in self._entries}

    def _declared(self, name: str) -> Declarations:
        """What SQL declares of a database; nothing of a made-up schema."""
        if name not in self._declarations:
            database, entry = self._database(name), self._entries_by_name.get(name)
            declared = Declarations() if entry is None else read_declarations(entry)
            if database is not None and entry is None:
                declared = declarations_of_database(database, self._schema(name))
            if database is not None and self.example_values:
                declared = replace(declared, values=read_values(database, self._schema(name), self.example_values))
            self._declarations[name] = declared
        return self._declarations[name]


def read_schema(entry: dict[str, Any]) -> Schema:
    """Tables and columns of an entry of `tables.json`, by their names in the database."""
    columns: list[list[str]] = [[] for _ in entry["table_names_original"]]
    for table, column in entry["column_names_original"]:
        if table >= 0:  # not of `*`
            columns[table].append(column)
    return list(zip(entry["table_names_original"], columns))


def schema_of_database(path: Path) -> Schema:
    """Tables and columns of a database file, which is not changed."""
    with closing(open_database(path)) as connection:
        query = "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite~_%' ESCAPE '~'"
        tables = [name for (name,) in connection.execute(query)]
        return [
            (table, [column for (column,) in connection.execute("SELECT name FROM pragma_table_info(?)", (table,))])
            for table in tables
        ]


def shuffle_schema(schema: Schema, rng: random.Random) -> Schema:
    """The same tables and columns in another order."""
    shuffled = [(table, rng.sample(columns, len(columns))) for table, columns in schema]
    rng.shuffle(shuffled)
    return shuffled


def format_schema(schema: Schema) -> str:
    """A schema as a line: `table:column,column|table:column`."""
    return "|".join(f"{table}:{','.join(columns)}" for table, columns in schema)


def normalize_sql(query: str, lower_case: bool = False) -> str:
    """
    A query on one line, with single spaces, none before a comma or inside brackets, and no semicolon at its end; with
    `lower_case` in lower case. What is quoted stays as it is.
    """
    parts = re.split(r"('[^']*'|\"[^\"]*\")", query.strip().rstrip("; \n\t"))
    for index in range(0, len(parts), 2):  # the others are quoted
        text = re.sub(r"\s+", " ", parts[index])
        text = re.sub(r" (?=[,)])|(?<=\() ", "", text)
        parts[index] = text.lower() if lower_case else text
    return "".join(parts)


def check_split(train: list[dict[str, str]], dev: list[dict[str, str]]) -> None:
    """Raise ValueError if a database is on both sides: what is measured would be memory, not reading."""
    shared = sorted({row["db_id"] for row in train} & {row["db_id"] for row in dev})
    if shared:
        raise ValueError(
            f"Training and test problems must be of different databases, got {len(shared)} in both, such as "
            f"{shared[0]!r}. Use the split of the data as it is published."
        )


def _text_of(prompt: str | list[dict[str, str]]) -> str:
    return prompt if isinstance(prompt, str) else prompt[0]["content"]


if __name__ == "__main__":
    sys.exit(main(Spider, Path(__file__).parent / "configs" / "spider-cpu.yaml"))
