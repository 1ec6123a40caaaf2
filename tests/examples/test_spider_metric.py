"""Spider: what queries return, how they are written, and that judging them changes nothing."""

import hashlib
import itertools
import json
import logging
import os
import random
import sqlite3
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from metrics.spider_accuracy import sql
from metrics.spider_accuracy.row_sets import results_match
from metrics.spider_accuracy.spider import GoldQueryError, judge_exact_match, judge_sql, read_schema
from metrics.spider_accuracy.spider_accuracy import SpiderAccuracy
from metrics.spider_accuracy.sql import QueryLimits, QueryRunner
from metrics.spider_accuracy.sql_text import extract_query, has_order_by, join_operators, split_sql, without_distinct
from sql_pairs import ALL_PAIRS, deep_queries, make_databases


METRICS = Path(__file__).parents[2] / "examples" / "metrics"
SPIDER = Path(__file__).parents[3] / "shared" / "data" / "spider"
SCHEMA = {"owner": ["id", "name", "city"], "pet": ["id", "owner_id", "name", "age", "kind"], "a": ["id"], "b": ["id"]}


@pytest.fixture(scope="module")
def databases(tmp_path_factory):
    return make_databases(tmp_path_factory.mktemp("databases"))


@pytest.fixture(scope="module")
def runner():
    with QueryRunner(QueryLimits(seconds=60, max_rows=10_000, max_bytes=2**20)) as runner:
        yield runner


class ImpatientRunner(QueryRunner):
    """Gives the queries that are to run out of time little of it, and all others much, however slow the machine is."""

    def __init__(self, patient, endless):
        super().__init__(QueryLimits(seconds=0.2))
        self.patient, self.endless = patient, endless

    def run(self, database, query):
        return super().run(database, query) if query in self.endless else self.patient.run(database, query)


def contents(folder):
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


QUERY = "SELECT name FROM pet WHERE kind = 'a;\n\nb'"


@pytest.mark.parametrize(
    "response",
    [
        QUERY,
        f"```sql\n{QUERY}\n```",
        f"```\n{QUERY}\n```\nThis query returns the names.",
        f"Here's the query:\n\n```sqlite\n{QUERY}\n```\n\nOr, simpler:\n\n```sql\nSELECT 1\n```",
        f"Run this first:\n```bash\nsqlite3 pets.db\n```\nand then\n```sql\n{QUERY}\n```",
        f"Sure!\n  ```SQL\n{QUERY}",  # cut off before its fence ends
        f"{QUERY}\n```\nThe names.",
        f"{QUERY};\n\nThis query returns the owner's pets.",
        f"{QUERY}\n\nIt returns the owner's pets.",
        f"SQL: {QUERY}",
        f"The owner's pets are needed.\n**SQL query:** {QUERY};\nThat is all.",
        f"The owner's pets are given by `{QUERY}`.",
        f"With the schema above, it is:\n```sql\n{QUERY}\n```",
        f"Here is the query: {QUERY}",
        f"1. {QUERY}",
        f"**{QUERY}**",
        f"The query is:\n\n{QUERY}\n\nIt returns names.",
        f"{QUERY}\nExplanation: it returns the owner's pets.",
        *(
            f"{QUERY}{end}\n\n{rest}"
            for end in ("", ";")
            for rest in ("**Explanation:** names", "### Explanation", "- names", "1. Names", "`pet` is a table.")
        ),
        f"{QUERY};\n\nWith this query you get the names.",
    ],
)
def test_the_query_is_taken_out_of_what_is_around_it(response):
    assert extract_query(response).strip() == QUERY


@pytest.mark.parametrize(
    "query",
    [
        "",
        "I do not know.",
        "SELECT\n\nname FROM pet",
        "SELECT name\n\nFROM pet\n\nWHERE age > 1\n\nORDER BY name;",
        "(SELECT name FROM pet) UNION SELECT city FROM owner",
        "-- names\nSELECT name FROM pet -- of pets\n\n-- all",
        "SELECT name FROM pet; SELECT city FROM owner",
        "SELECT name FROM pet; DROP TABLE pet",
        "WITH a AS (SELECT 1)\n\nSELECT * FROM a",
        "with recursive a(x) as (select 1)\n\nselect x - 1 from a",
        "SELECT name FROM pet;\n\n-- all",
        "DROP TABLE pet",
        "SELECT `name` FROM `pet`",
    ],
)
def test_a_text_that_is_a_query_or_has_none_stays_as_it_is(query):
    assert extract_query(query) == query


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="selctfromwihSELECT`;\n '\"(-sql:*", max_size=60))
def test_what_is_taken_out_is_a_piece_of_the_text(text):
    assert extract_query(text) in text


def test_queries_of_the_dataset_stay_as_they_are():
    if not SPIDER.exists():
        pytest.skip("needs the data of Spider")
    for name in ("train", "dev"):
        for row in json.loads((SPIDER / f"{name}.json").read_text()):
            assert extract_query(row["query"]) == row["query"]


def test_a_response_in_prose_is_judged_by_its_query(databases, runner):
    pets, _ = databases
    schema = read_schema(pets, runner)
    gold = "SELECT name FROM pet"
    for response in (f"Here it is:\n```sql\n{gold};\n```\nIt lists pets.", f"{gold};\n\nIt lists pets."):
        assert judge_sql(response, gold, pets, runner).is_right
        assert judge_exact_match(response, gold, schema).is_right


def test_pairs_are_judged_as_by_hand_and_change_nothing(databases, runner, monkeypatch):
    monkeypatch.setattr(sql, "_GRACE", 0.3)
    pets, _ = databases
    assert len(ALL_PAIRS) >= 200 and len(set(ALL_PAIRS)) == len(ALL_PAIRS)
    before = contents(pets.parents[1])
    endless = {prediction for _, _, prediction, kind in ALL_PAIRS if kind == "time"}
    with (
        ImpatientRunner(runner, endless) as impatient,
        sqlite3.connect(pets) as other,
    ):  # an open connection neither disturbs nor is disturbed
        assert other.execute("SELECT count(*) FROM pet").fetchone() == (5,)
        wrong = []
        for topic, gold, prediction, kind in ALL_PAIRS:
            judgement = judge_sql(prediction, gold, pets, impatient, keep_distinct=topic != "published default")
            if judgement.kind != kind or judgement.is_right != (kind == "right"):
                wrong.append((topic, gold, prediction, kind, judgement))
        assert wrong == []
    assert contents(pets.parents[1]) == before


def test_faults_of_the_data_are_not_the_models(databases, runner, tmp_path):
    pets, _ = databases
    for gold in (
        "SELECT nothing FROM pet",
        "DELETE FROM pet",
        "",
        "SELECT a.id FROM pet a, pet, pet c, pet d, pet e, pet f",
    ):
        with pytest.raises(GoldQueryError, match="Mend the data"):
            judge_sql("SELECT 1", gold, pets, runner)
    with pytest.raises(GoldQueryError, match="no database"):
        judge_sql("SELECT 1", "SELECT 1", tmp_path / "missing.sqlite", runner)
    with pytest.raises(GoldQueryError, match="no database"):
        read_schema(tmp_path / "missing.sqlite", runner)
    assert list(tmp_path.iterdir()) == []


def test_distinct_counts_only_if_asked_for(databases, runner):
    pets, _ = databases
    pair = "SELECT DISTINCT name FROM pet", "SELECT name FROM pet"
    assert judge_sql(*pair, pets, runner).is_right
    assert not judge_sql(*pair, pets, runner, keep_distinct=True).is_right
    reference = {"query": pair[0], "database": str(databases[0])}
    for keep_distinct, share in ({}, 1.0), ({"keep_distinct": True}, 0.0):
        metric = SpiderAccuracy(exact_match=False, **keep_distinct)
        assert metric.compute(predictions=[pair[1]], references=[reference])["accuracy"] == share
    assert without_distinct("SELECT DISTINCT 'distinct' FROM x -- distinct") == "SELECT  'distinct' FROM x -- distinct"


def test_an_operator_with_the_word_distinct_stays(databases, runner):
    pets, _ = databases
    for operator, age in ("IS NOT DISTINCT FROM", "= 3"), ("is\n/* not */distinct from", "<> 3 OR age IS NULL"):
        query = f"SELECT DISTINCT id FROM pet WHERE age {operator} 3"
        assert without_distinct(query) == f"SELECT  id FROM pet WHERE age {operator} 3"
        if sqlite3.sqlite_version_info >= (3, 39):
            plain = f"SELECT id FROM pet WHERE age {age}"
            assert judge_sql(query, plain, pets, runner).is_right and judge_sql(plain, query, pets, runner).is_right
    for query in (
        "SELECT count(DISTINCT age) FROM pet",
        "SELECT a IS (DISTINCT b) FROM pet",
        "SELECT a, DISTINCT FROM x",
    ):
        assert "DISTINCT" not in without_distinct(query)


@pytest.mark.parametrize("query", ["{}; -- so", "{};;", "; {}", "/* a */;{}; /* b */ ;\n", "{} -- ; SELECT 2"])
def test_statements_that_hold_nothing_do_not_count(query, databases, runner):
    pets, _ = databases
    plain = "SELECT name FROM pet WHERE name <> ';'"
    query = query.format(plain)
    for prediction, gold in ((query, plain), (plain, query)):
        assert judge_sql(prediction, gold, pets, runner).is_right
        assert judge_exact_match(prediction, gold, SCHEMA).is_right
    for several in (f"{query}\n; SELECT 1", " ; -- nothing\n;"):
        assert judge_sql(several, plain, pets, runner).kind in ("several statements", "no query")
        assert judge_exact_match(several, plain, SCHEMA).kind == "not parsed"


BROKEN = {
    "a view of a table that is gone": "CREATE TABLE gone (x); CREATE VIEW v AS SELECT x FROM gone; DROP TABLE gone;",
    "a virtual table": "CREATE VIRTUAL TABLE v USING fts5(body);",
    "a view with a function of an application": "CREATE VIEW v AS SELECT first_letter(name) FROM pet;",
}


@pytest.mark.parametrize("fault", BROKEN)
def test_what_is_broken_elsewhere_in_a_database_does_not_matter(fault, tmp_path):
    path = tmp_path / "pets.sqlite"
    with sqlite3.connect(path) as connection:
        connection.executescript("CREATE TABLE pet (name, age); INSERT INTO pet VALUES ('Rex', 3);" + BROKEN[fault])
    gold = {"query": "SELECT name FROM pet", "database": str(path)}
    result = SpiderAccuracy().compute(predictions=[gold["query"], "SELECT * FROM v"], references=[gold] * 2)
    assert (result["num_right"], result["exact_match_num_right"]) == (1, 1)
    with pytest.raises(GoldQueryError, match="Reference 0"):
        SpiderAccuracy().compute(predictions=["x"], references=[{**gold, "query": "SELECT * FROM v"}])


def test_further_keys_of_a_reference_are_left_out(databases):
    pets, _ = databases
    query = "SELECT name FROM pet"
    reference = {"query": query, "database": pets, "db_id": "pets", "question": "Who?", "toks": [["a"], [1]]}
    metric = SpiderAccuracy()
    assert metric.compute(predictions=[query], references=[reference])["accuracy"] == 1.0
    metric.add(prediction=query, reference=reference)
    metric.add_batch(predictions=[query], references=[{**reference, "more": None}])
    assert metric.compute()["num_right"] == 2
    by_name = SpiderAccuracy(database_folder=pets.parents[1])
    assert by_name.compute(predictions=[query], references=[reference])["exact_match"] == 1.0
    with pytest.raises(ValueError, match=r"must have the keys \('query', 'db_id'\), got \['query'\]"):
        by_name.compute(predictions=[query], references=[{"query": query}])


@pytest.mark.parametrize("prediction", [None, "\ud800", "SELECT count(DISTINCT) FROM pet", "\0", "(" * 200_000])
def test_a_prediction_that_is_no_query_costs_one_judgement(prediction, databases):
    reference = {"query": "SELECT name FROM pet", "database": databases[0]}
    predictions = [reference["query"], prediction, reference["query"]]
    result = SpiderAccuracy().compute(predictions=predictions, references=[reference] * 3)
    assert (result["num_right"], result["exact_match_num_right"]) == (2, 2)


@pytest.mark.parametrize("name", deep_queries(1))
def test_time_to_describe_a_query_grows_with_its_length(name, monkeypatch):
    """Counted in descriptions; each level of these queries took twice as long as the one before."""
    from metrics.spider_accuracy import sql_clauses

    def count(depth):
        calls = []
        seal = sql_clauses._seal
        with monkeypatch.context() as context:
            context.setattr(sql_clauses, "_seal", lambda *parts: calls.append(1) or seal(*parts))
            assert judge_exact_match(deep_queries(depth)[name], "SELECT 1", SCHEMA).kind == "other clauses"
        return len(calls)

    counts = [count(depth) for depth in (6, 8, 10)]
    assert 0 < counts[1] - counts[0] == counts[2] - counts[1]


def test_a_parser_that_tries_again_and_again_is_stopped():
    def nested(depth):
        return "SELECT " + "DATE(" * depth + "1" + ")" * depth

    assert judge_exact_match(nested(5), nested(5), SCHEMA).is_right
    assert judge_exact_match(nested(40), "SELECT 1", SCHEMA).kind == "not parsed"


@pytest.mark.parametrize("prediction", ["PRAGMA x", "EXPLAIN SELECT 1", "SHOW TABLES", "CREATE TRIGGER x y z"])
def test_the_parser_says_nothing(prediction, capfd, caplog):
    logging.getLogger("sqlglot").warning("heard")
    judge_exact_match(prediction, "SELECT 1", SCHEMA)
    logging.getLogger("sqlglot").warning("heard")
    assert caplog.messages == ["heard"] * 2
    assert capfd.readouterr() == ("", "")


def by_all_permutations(gold, predicted, is_ordered):
    if len(gold) != len(predicted) or (gold and len(gold[0]) != len(predicted[0])):
        return False
    for order in itertools.permutations(range(len(gold[0]) if gold else 0)):
        permuted = [tuple(row[column] for column in order) for row in predicted]
        if permuted == gold if is_ordered else Counter(permuted) == Counter(gold):
            return True
    return False


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 4), st.integers(0, 5), st.integers(1, 3), st.booleans())
def test_search_over_columns_agrees_with_trying_all(seed, num_columns, num_rows, num_values, is_ordered):
    """Half of the predicted tables are shuffled gold ones, of which half have one value changed."""
    generator = random.Random(seed)
    values = [None, 1, 1.0, "1", b"1", 0.5]

    def table():
        return [tuple(generator.choice(values[:num_values]) for _ in range(num_columns)) for _ in range(num_rows)]

    gold = table()
    predicted = table()
    if generator.random() < 0.6:
        order = generator.sample(range(num_columns), num_columns)
        predicted = [tuple(row[column] for column in order) for row in gold]
        if not is_ordered:
            generator.shuffle(predicted)
        if num_rows and generator.random() < 0.5:
            row = generator.randrange(num_rows)
            predicted[row] = table()[0]
    assert results_match(gold, predicted, is_ordered) == by_all_permutations(gold, predicted, is_ordered)


def cycles(*lengths):
    """A table with a row for each edge and a column for each corner: all columns look alike."""
    edges, start = [], 0
    for length in lengths:
        edges += [(start + i, start + (i + 1) % length) for i in range(length)]
        start += length
    return [tuple(int(corner in edge) for corner in range(start)) for edge in edges]


@pytest.mark.parametrize("is_ordered", [False, True])
def test_columns_that_look_alike_do_not_take_forever(is_ordered):
    same = [(row % 3,) * 16 for row in range(50)]
    assert results_match(same, same, is_ordered)
    assert not results_match(same, [*same[:-1], (1,) + (2,) * 15], is_ordered)
    diagonal = [tuple(int(row == column) for column in range(14)) for row in range(14)]
    assert results_match(diagonal, [row[::-1] for row in diagonal], is_ordered)
    ring = cycles(14)
    shuffled = [tuple(row[i * 3 % 14] for i in range(14)) for row in ring]
    assert results_match(ring, shuffled, is_ordered)
    assert not results_match(ring, cycles(7, 7), is_ordered) and not results_match(cycles(4, 10), cycles(7, 7), False)


@settings(max_examples=50, deadline=None)
@given(st.text(alphabet="ab'\"`[]-/*; \n>=orderbyORDERBY", max_size=30))
def test_words_of_a_query_are_the_query(query):
    assert "".join(text for _, text in split_sql(query)) == query
    assert join_operators(query).replace(" ", "").replace("\n", "") == query.replace(" ", "").replace("\n", "")


def test_order_by_counts_outside_of_quotes():
    assert has_order_by("select 1 Order\n by 1") and has_order_by("select (select 1 order by 1)")
    for query in ("select 'order by'", 'select "order by"', "select 1 -- order by", "select orderby, order_by"):
        assert not has_order_by(query)


JOINED = "SELECT T1.name FROM owner AS T1 JOIN pet AS T2 ON T1.id = T2.owner_id"
EXACT = [
    ("SELECT name FROM pet", "select NAME from Pet;", True),
    ("SELECT name FROM pet", "SELECT T1.name FROM pet AS T1", True),
    ("SELECT name FROM pet", "SELECT pet.name AS n FROM pet", True),
    ("SELECT name FROM pet", "SELECT DISTINCT name FROM pet", True),
    ("SELECT name FROM pet", "SELECT age FROM pet", False),
    ("SELECT name FROM pet", "SELECT name FROM owner", False),
    ("SELECT name FROM pet", "SELECT name FROM cat", False),
    ("SELECT name, age FROM pet", "SELECT age, name FROM pet", True),
    ("SELECT name, name FROM pet", "SELECT name FROM pet", False),
    ("SELECT count(*) FROM pet", "SELECT count(id) FROM pet", False),
    ("SELECT count(name) FROM pet", "SELECT COUNT(DISTINCT name) FROM pet", True),
    ("SELECT max(age) FROM pet", "SELECT min(age) FROM pet", False),
    ("SELECT name FROM pet WHERE age > 3", "SELECT name FROM pet WHERE age > 5", True),
    ("SELECT name FROM pet WHERE age > 3", "SELECT name FROM pet WHERE 3 < age", True),
    ("SELECT name FROM pet WHERE age > 3", "SELECT name FROM pet WHERE age >= 3", False),
    ("SELECT name FROM pet WHERE age > 3", "SELECT name FROM pet WHERE age > = 3", False),
    ("SELECT name FROM pet WHERE age >= 3", "SELECT name FROM pet WHERE age > = -3.5", True),
    ("SELECT name FROM pet WHERE age != 3", "SELECT name FROM pet WHERE age <> 4", True),
    ("SELECT name FROM pet WHERE kind = 'dog'", 'SELECT name FROM pet WHERE kind = "cat"', True),
    ("SELECT name FROM pet WHERE kind = name", 'SELECT name FROM pet WHERE kind = "name"', True),
    ("SELECT name FROM pet WHERE kind = name", "SELECT name FROM pet WHERE kind = 'name'", False),
    ("SELECT name FROM pet WHERE kind LIKE '%a'", "SELECT name FROM pet WHERE kind NOT LIKE '%a'", False),
    ("SELECT id FROM pet WHERE age = 1 AND kind = 'a'", "SELECT id FROM pet WHERE kind = 'b' AND (age = 2)", True),
    ("SELECT id FROM pet WHERE age = 1 AND kind = 'a'", "SELECT id FROM pet WHERE kind = 'b' OR age = 2", False),
    ("SELECT id FROM pet WHERE age = 1 AND kind = 2 OR id = 3",
     "SELECT id FROM pet WHERE age = 1 AND (kind = 2 OR id = 3)",
     False),
    ("SELECT id FROM pet WHERE age BETWEEN 1 AND 2", "SELECT id FROM pet WHERE age BETWEEN 3 AND 4", True),
    ("SELECT id FROM pet WHERE age IN (1, 2)", "SELECT id FROM pet WHERE age IN (3)", True),
    ("SELECT id FROM pet WHERE age IN (1, 2)", "SELECT id FROM pet WHERE age NOT IN (1, 2)", False),
    ("SELECT id FROM pet WHERE age IS NULL", "SELECT id FROM pet WHERE age IS NOT NULL", False),
    (JOINED, "SELECT a.name FROM pet b JOIN owner a ON b.owner_id = a.id", True),
    (JOINED, "SELECT owner.name FROM owner JOIN pet ON owner.id = pet.owner_id", True),
    (JOINED, "SELECT T1.name FROM owner AS T1 LEFT JOIN pet AS T2 ON T1.id = T2.owner_id", False),
    (JOINED, "SELECT T1.name FROM owner AS T1 JOIN pet AS T2 ON T1.id = T2.id", False),
    (JOINED, "SELECT T2.name FROM owner AS T1 JOIN pet AS T2 ON T1.id = T2.owner_id", False),
    (f"{JOINED} GROUP BY T1.id", f"{JOINED} GROUP BY T2.owner_id", True),
    (f"{JOINED} GROUP BY T1.id", f"{JOINED} GROUP BY T2.id", False),
    ("SELECT a.id FROM a JOIN b ON a.id = b.id", "SELECT b.id FROM a JOIN b USING (id)", True),
    ("SELECT kind FROM pet GROUP BY kind HAVING count(*) > 1",
     "SELECT kind FROM pet GROUP BY kind HAVING count(*) > 2", True),
    ("SELECT kind FROM pet GROUP BY kind HAVING count(*) > 1", "SELECT kind FROM pet GROUP BY kind", False),
    ("SELECT 1 FROM pet GROUP BY kind, age", "SELECT 1 FROM pet GROUP BY age, kind", True),
    ("SELECT id FROM pet ORDER BY age", "SELECT id FROM pet ORDER BY age ASC", True),
    ("SELECT id FROM pet ORDER BY age", "SELECT id FROM pet ORDER BY age DESC", False),
    ("SELECT id FROM pet ORDER BY age, id", "SELECT id FROM pet ORDER BY id, age", False),
    ("SELECT kind FROM pet ORDER BY count(*)", "SELECT kind, count(*) AS n FROM pet ORDER BY n", False),
    ("SELECT kind, count(*) FROM pet ORDER BY count(*)", "SELECT kind, count(*) AS n FROM pet ORDER BY n", True),
    ("SELECT id FROM pet ORDER BY age LIMIT 1", "SELECT id FROM pet ORDER BY age LIMIT 3", True),
    ("SELECT id FROM pet ORDER BY age LIMIT 1", "SELECT id FROM pet ORDER BY age", False),
    ("SELECT id FROM pet LIMIT 1", "SELECT id FROM pet LIMIT 1 OFFSET 1", False),
    ("SELECT id FROM a UNION SELECT id FROM b", "SELECT id FROM a UNION SELECT id FROM b", True),
    ("SELECT id FROM a UNION SELECT id FROM b", "SELECT id FROM a UNION ALL SELECT id FROM b", False),
    ("SELECT id FROM a EXCEPT SELECT id FROM b", "SELECT id FROM b EXCEPT SELECT id FROM a", False),
    ("SELECT id FROM a EXCEPT SELECT id FROM b", "SELECT id FROM a INTERSECT SELECT id FROM b", False),
    ("SELECT id FROM pet WHERE owner_id IN (SELECT id FROM owner)",
     "SELECT id FROM pet WHERE owner_id IN (SELECT T1.id FROM owner AS T1)", True),
    ("SELECT id FROM pet WHERE owner_id IN (SELECT id FROM owner)",
     "SELECT id FROM pet WHERE owner_id IN (SELECT id FROM a)", False),
    ("SELECT n FROM (SELECT name AS n FROM pet) AS x", "SELECT y.n FROM (SELECT pet.name AS n FROM pet) AS y", True),
    ("SELECT age + 1 FROM pet", "SELECT age + 2 FROM pet", False),
    ("SELECT * FROM pet", "SELECT id FROM pet", False),
    ("SELECT id FROM pet WHERE age IS NOT DISTINCT FROM 3", "SELECT id FROM pet WHERE age IS DISTINCT FROM 3", False),
    ("SELECT count(*) AS n FROM pet ORDER BY n", "SELECT count(*) FROM pet ORDER BY count(*)", True),
    ("SELECT height AS height FROM pet", "SELECT height FROM pet", True),
    ("SELECT id FROM pet WHERE age > (-3)", "SELECT id FROM pet WHERE age > 3", True),
    ("SELECT id FROM pet WHERE age > -age", "SELECT id FROM pet WHERE age > age", False),
    ("SELECT a.id FROM a JOIN b ON (a.id = b.id)", "SELECT b.id FROM a JOIN b ON a.id = b.id", True),
    ("SELECT /* one */ id FROM a", "SELECT id -- two\nFROM a", True),
    ("SELECT id FROM a UNION SELECT id FROM b ORDER BY id", "SELECT id FROM a UNION SELECT id FROM b", False),
]  # fmt: skip


@pytest.mark.parametrize(("gold", "prediction", "is_right"), EXACT)
def test_clauses_are_compared(gold, prediction, is_right):
    assert judge_exact_match(gold, gold, SCHEMA).is_right
    assert judge_exact_match(prediction, gold, SCHEMA).is_right is is_right


@pytest.mark.parametrize("prediction", ["", "SELEC 1", "SELECT 1; SELECT 2", "DROP TABLE pet", "SELECT " + "(" * 3000])
def test_what_cannot_be_parsed_is_wrong(prediction):
    assert judge_exact_match(prediction, "SELECT 1", SCHEMA).kind == "not parsed"
    with pytest.raises(GoldQueryError, match="must be one query"):
        judge_exact_match("SELECT 1", prediction, SCHEMA)


def test_metric_counts_both_and_runs_in_batches(databases, tmp_path):
    pets, odd = databases
    gold = "SELECT name FROM pet WHERE kind = 'dog'"
    predictions = [gold, "SELECT name FROM pet WHERE kind = 'cat'", "SELECT nme FROM pet", "DELETE FROM pet"]
    metric = SpiderAccuracy(database_folder=pets.parents[1])
    for prediction in predictions:
        metric.add_batch(predictions=[prediction], references=[{"query": gold, "db_id": "pets"}])
    result = metric.compute()
    assert (result["accuracy"], result["num_right"], result["num_answers"]) == (0.25, 1, 4)
    assert result["kinds"] == {"right": 1, "other result": 1, "unknown name": 1, "forbidden": 1}
    assert result["exact_match"] == 0.5 and 0 < result["interval"][0] < 0.25 < result["interval"][1] < 1
    by_path = SpiderAccuracy(exact_match=False)
    result = by_path.compute(predictions=["SELECT 1"], references=[{"query": "SELECT a FROM t", "database": str(odd)}])
    assert result["accuracy"] == 1.0 and "exact_match" not in result
    with pytest.raises(GoldQueryError, match="Reference 0.*no database"):
        by_path.compute(predictions=["x"], references=[{"query": "x", "database": str(tmp_path / "missing")}])


def test_a_missing_parser_is_said_to_be_missing():
    code = (
        "import sys; sys.modules['sqlglot'] = None; import metrics.spider_accuracy.sql_clauses as module; "
        "module.describe_query('SELECT 1', {})"
    )
    environment = {**os.environ, "PYTHONPATH": str(METRICS.parent)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert "pip install cllm_hf[spider]" in result.stderr.splitlines()[-1]


def test_schema_is_read_in_lower_case(databases, runner):
    schema = read_schema(databases[0], runner)
    assert schema["order"] == ["id", "select", "note"] and schema["old"] == ["name"]


@pytest.mark.slow
@pytest.mark.skipif(not SPIDER.exists(), reason="needs the data of Spider")
def test_gold_queries_of_spider_are_right():
    wrong = []
    schemas = {}
    with QueryRunner() as runner:
        for row in json.loads((SPIDER / "dev.json").read_text()):
            database, query = SPIDER / "database" / row["db_id"] / f"{row['db_id']}.sqlite", row["query"]
            schemas[database] = schemas.get(database) or read_schema(database, runner)
            executed = judge_sql(query, query, database, runner)
            matched = judge_exact_match(query, query, schemas[database])
            if not (executed.is_right and matched.is_right):
                wrong.append((row["db_id"], query, executed, matched))
    assert wrong == []
