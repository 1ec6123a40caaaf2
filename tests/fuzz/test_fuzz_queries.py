"""
Queries as models may write them, mutated at random: none hangs, and none raises an exception.

`FUZZ_CASES=100000 pytest -s -m slow tests/fuzz/test_fuzz_queries.py` tries as many; `FUZZ_SEED` gives other ones.
"""

import random

import pytest
from fuzzing import SEED, num_cases, run_cases
from metrics.spider_accuracy.spider import judge_exact_match, judge_sql, read_schema
from metrics.spider_accuracy.spider_accuracy import SpiderAccuracy
from metrics.spider_accuracy.sql import QueryLimits, QueryRunner
from metrics.spider_accuracy.sql_text import split_sql
from sql_pairs import ALL_PAIRS, deep_queries, make_databases


GOLD = "SELECT T1.name FROM owner AS T1 JOIN pet AS T2 ON T1.id = T2.owner_id WHERE T2.age > 3 ORDER BY T2.age LIMIT 1"
# Some kinds of queries are made to take long: they are not for a fuzzer that tries many.
SEEDS = [pair[2] for pair in ALL_PAIRS if pair[0] not in ("limits", "more than reading")] + [
    GOLD,
    "SELECT kind, count(DISTINCT name) AS n FROM pet GROUP BY kind HAVING count(*) > 1 ORDER BY n DESC LIMIT 3",
    "WITH a AS (SELECT * FROM pet), b AS (SELECT * FROM a) SELECT x.name FROM a AS x JOIN b AS y USING (id)",
    "SELECT CASE WHEN age IS NOT DISTINCT FROM 3 THEN 'a' ELSE CAST(age AS TEXT) END FROM pet WHERE name LIKE '%e%'",
    "SELECT name FROM pet WHERE age NOT BETWEEN 1 AND 2 EXCEPT SELECT name FROM owner WHERE city IN ('Oslo', 'Rome')",
    "SELECT id, rank() OVER (PARTITION BY kind ORDER BY age) FROM pet WHERE EXISTS (SELECT 1 FROM owner)",
]
WORDS = (
    "SELECT FROM WHERE AND OR NOT IN IS NULL LIKE BETWEEN EXISTS CASE WHEN THEN ELSE END AS ON USING JOIN LEFT OUTER "
    "NATURAL CROSS UNION ALL EXCEPT INTERSECT GROUP ORDER BY HAVING LIMIT OFFSET DISTINCT WITH RECURSIVE VALUES CAST "
    "COLLATE ASC DESC OVER PARTITION FILTER WINDOW ESCAPE GLOB REGEXP MATCH DATE INTERVAL ARRAY STRUCT MAP "
    "PIVOT LATERAL QUALIFY TOP FETCH FOR IF REPLACE PRAGMA EXPLAIN SHOW VACUUM count max date strftime json_extract "
    "pet owner T1 T2 age name id kind 1 -2 3.5e9 0x1F 'a' \"b\" `c` [d] ( ) (( )) , ; . * = == <> != < > <= >= + - / "
    "% || | & ~ << >> -> ->> :: : ? ?1 @x $y #z { } ' \" ` [ ] -- /* */ \\ \0 é \u2028 \ud800 ½"
).split(" ")
WRAPPINGS = [
    ("(", ")"),
    ("DATE(", ")"),
    ("count(DISTINCT ", ")"),
    ("CAST(", " AS INT)"),
    ("CASE WHEN ", " THEN 1 END"),
    ("(SELECT ", ")"),
    ("SELECT * FROM (", ") AS x"),
    ("SELECT 1 WHERE 1 IN (", ")"),
    ("EXISTS (", ")"),
    ("(SELECT 1 LIMIT (", "))"),
    ("age BETWEEN ", " AND 1"),
    ("NOT ", ""),
    ("- ", ""),
    ("age = ", ""),
    ("WITH x AS (", ") SELECT * FROM x"),
    ("sum(1) OVER (PARTITION BY ", ")"),
    ("f(", ", 1)"),
    ("ARRAY[", "]"),
]


def pick_slice(words, generator):
    first, last = sorted(generator.randrange(len(words) + 1) for _ in range(2))
    return first, last


def mutate(query, generator):
    """One change: words and pieces are taken out, exchanged, repeated, put from elsewhere, or wrapped, also deeply."""
    words = [text for _, text in split_sql(query)] or [""]
    first, last = pick_slice(words, generator)
    piece = words[first:last]
    way = generator.randrange(9)
    if way == 0:
        piece = piece[: len(piece) // 2]
    elif way == 1:
        generator.shuffle(piece)
    elif way == 2:
        piece = piece * generator.choice([2, 2, 3, 30])
    elif way == 3:
        before, after = generator.choice(WRAPPINGS)
        depth = generator.choice([1, 1, 2, 5, 20])
        piece = [" ", before * depth, *piece, after * depth, " "]
    elif way == 4:
        other = [text for _, text in split_sql(generator.choice(SEEDS))]
        start, end = pick_slice(other, generator)
        piece = [" ", *other[start:end], " "]
    elif way == 5:
        piece = [f" {generator.choice(WORDS)} " for _ in range(generator.choice([1, 1, 3, 10]))]
    elif way == 6:
        return query[: generator.randrange(len(query) + 1)]
    elif way == 7:
        place = generator.randrange(len(query) + 1)
        return query[:place] + generator.choice(WORDS) + query[place:]
    else:
        place = generator.randrange(len(words))
        words[place] = generator.choice(WORDS)
        return "".join(words)
    return "".join([*words[:first], *piece, *words[last:]])


def make_query(number):
    """The query of a number: some changes of one that is sound, or is nested in a way that takes long."""
    generator = random.Random(f"{SEED} {number}")
    query = generator.choice(SEEDS)
    if generator.random() < 0.1:
        query = generator.choice(list(deep_queries(generator.choice([1, 5, 30])).values()))
    for _ in range(generator.choice([1, 1, 2, 3, 6])):
        query = mutate(query, generator)[:20_000]
    return query


@pytest.fixture(scope="module")
def pets(tmp_path_factory):
    return make_databases(tmp_path_factory.mktemp("databases"))[0]


def judge_all(first, last, pets):
    with QueryRunner(QueryLimits(seconds=0.2, max_rows=1000, max_bytes=2**20)) as runner:
        schema = read_schema(pets, runner)

        def judge(query):
            executed = judge_sql(query, GOLD, pets, runner)
            matched = judge_exact_match(query, GOLD, schema)
            assert matched.kind in ("right", "other clauses", "not parsed")
            assert matched.is_right == (matched.kind == "right") and executed.is_right == (executed.kind == "right")
            return f"{executed.kind}, {matched.kind}"

        return run_cases(map(make_query, range(first, last)), judge)


def test_mutated_queries_are_judged(pets, capfd):
    kinds = judge_all(0, 300, pets)
    assert sum(kinds.values()) == 300 and len(kinds) > 4
    assert capfd.readouterr().err == ""


def test_an_evaluation_of_mutated_queries_comes_to_an_end(pets):
    predictions = [make_query(number) for number in range(300, 400)]
    metric = SpiderAccuracy(limits=QueryLimits(seconds=0.2))
    result = metric.compute(predictions=[*predictions, GOLD], references=[{"query": GOLD, "database": pets}] * 101)
    assert result["num_answers"] == 101 and result["num_right"] >= 1 and result["exact_match_num_right"] >= 1


@pytest.mark.slow
def test_many_mutated_queries_are_judged(pets):
    judge_all(1000, 1000 + num_cases(5000), pets)
