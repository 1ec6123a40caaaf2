"""Hand-made pairs of gold and predicted queries on the databases of `make_databases`, by topic, as judged by hand."""

import sqlite3


RIGHT, OTHER = "right", "other result"
ENDLESS = "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r)"
ALL_PETS = "SELECT name, age FROM pet"


def make_databases(folder):
    """Two databases: pets, with NULLs, duplicates and texts that are not UTF-8; and one whose name must be escaped."""
    pets = folder / "pets" / "pets.sqlite"
    odd = folder / "odd" / "50% a#b?c.sqlite"
    for path in (pets, odd):
        path.parent.mkdir()
    with sqlite3.connect(pets) as connection:
        connection.executescript("""
            CREATE TABLE owner (id INTEGER PRIMARY KEY, name TEXT, city TEXT);
            CREATE TABLE pet (id INTEGER PRIMARY KEY, owner_id INT, name TEXT, age INT, weight REAL, kind TEXT);
            CREATE TABLE "order" (id INTEGER PRIMARY KEY, "select" TEXT, note TEXT);
            CREATE TABLE empty (a, b, c);
            CREATE TABLE bytes (a);
            CREATE INDEX by_age ON pet (age);
            CREATE VIEW old AS SELECT name FROM pet WHERE age > 5;
            INSERT INTO owner VALUES (1, 'Ann', 'Oslo'), (2, 'Bob', 'Rome'), (3, 'Cid', NULL), (4, 'Dee', 'Oslo');
            INSERT INTO pet VALUES (1, 1, 'Rex', 3, 10.5, 'dog'), (2, 1, 'Tom', 7, 4.0, 'cat'),
                (3, 2, 'Rex', 9, 0.3, 'dog'),
                (4, 3, 'Zoe', NULL, 2.5, 'cat'), (5, NULL, 'Kim', 3, NULL, 'bird');
            INSERT INTO "order" VALUES (1, 'order by', 'it''s'), (2, 'x', 'a;b -- c');
            INSERT INTO bytes VALUES (CAST(x'ff6f6b' AS TEXT)), (x'6f6b');
        """)
    with sqlite3.connect(odd) as connection:
        connection.executescript("CREATE TABLE t (a); INSERT INTO t VALUES (1);")
    return pets, odd


# (gold, prediction, kind)
PAIRS = {
    "order of rows": [
        ("SELECT name FROM pet ORDER BY id", "SELECT name FROM pet ORDER BY id ASC", RIGHT),
        ("SELECT name FROM pet ORDER BY id", "SELECT name FROM pet ORDER BY id DESC", OTHER),
        ("SELECT name FROM pet order by id desc", "SELECT name FROM pet ORDER BY id", OTHER),
        ("SELECT id FROM pet", "SELECT id FROM pet ORDER BY id DESC", RIGHT),
        ("SELECT id FROM pet ORDER  BY id", "SELECT id FROM pet ORDER BY -id", OTHER),
        ("SELECT id FROM pet ORDER\n\tBY id", "SELECT id FROM pet ORDER BY -id", OTHER),
        ("SELECT id FROM pet ORDER /* so */ BY id", "SELECT id FROM pet ORDER BY -id", OTHER),
        ("SELECT id FROM pet -- order by id", "SELECT id FROM pet ORDER BY -id", RIGHT),
        ("SELECT id FROM pet WHERE name <> 'order by'", "SELECT id FROM pet ORDER BY -id", RIGHT),
        ('SELECT id FROM pet WHERE name <> "order by"', "SELECT id FROM pet ORDER BY -id", RIGHT),
        ("SELECT id FROM pet WHERE name <> 'it''s order by'", "SELECT id FROM pet ORDER BY -id", RIGHT),
        ("SELECT id FROM (SELECT id FROM pet ORDER BY id)", "SELECT id FROM pet ORDER BY -id", OTHER),
        ("SELECT id FROM (SELECT id FROM pet ORDER BY id)", "SELECT id FROM pet ORDER BY id", RIGHT),
        ("SELECT name, age FROM pet ORDER BY id", "SELECT age, name FROM pet ORDER BY id", RIGHT),
        ("SELECT name, age FROM pet ORDER BY id", "SELECT age, name FROM pet ORDER BY -id", OTHER),
        ("SELECT name FROM pet ORDER BY age LIMIT 1 OFFSET 4", "SELECT 'Rex' FROM pet LIMIT 1", RIGHT),
        ("SELECT age FROM pet ORDER BY age", "SELECT age FROM pet ORDER BY age, id DESC", RIGHT),
        ("SELECT age, id FROM pet ORDER BY age, id", "SELECT age, id FROM pet ORDER BY age, -id", OTHER),
        ("SELECT max(age) FROM pet", "SELECT age FROM pet ORDER BY age DESC LIMIT 1", RIGHT),
        ("SELECT age FROM pet ORDER BY age DESC LIMIT 1", "SELECT max(age) FROM pet", RIGHT),
    ],
    "duplicates": [
        ("SELECT name FROM pet", "SELECT name FROM pet", RIGHT),
        ("SELECT name FROM pet", "SELECT DISTINCT name FROM pet", OTHER),
        ("SELECT DISTINCT name FROM pet", "SELECT name FROM pet", OTHER),
        ("SELECT DISTINCT name FROM pet", "SELECT name FROM pet GROUP BY name", RIGHT),
        ("SELECT name FROM pet", "SELECT name FROM pet UNION SELECT name FROM pet", OTHER),
        ("SELECT DISTINCT name FROM pet", "SELECT name FROM pet UNION SELECT name FROM pet", RIGHT),
        ("SELECT kind FROM pet", "VALUES ('dog'), ('dog'), ('cat'), ('cat'), ('bird')", RIGHT),
        ("SELECT kind FROM pet", "VALUES ('dog'), ('dog'), ('dog'), ('cat'), ('bird')", OTHER),
        ("SELECT kind FROM pet", "VALUES ('dog'), ('cat'), ('cat'), ('bird'), ('bird')", OTHER),
        ("SELECT count(name) FROM pet", "SELECT count(DISTINCT name) FROM pet", OTHER),
        ("SELECT count(kind) FROM pet", "SELECT 5", RIGHT),
        ("VALUES (1, 2), (1, 2), (3, 4)", "VALUES (1, 2), (3, 4), (3, 4)", OTHER),
        ("VALUES (1, 2), (1, 2), (3, 4)", "VALUES (2, 1), (4, 3), (2, 1)", RIGHT),
        ("SELECT 1 UNION ALL SELECT 1", "SELECT 1", OTHER),
        ("SELECT 1 UNION ALL SELECT 1", "VALUES (1), (1)", RIGHT),
    ],
    # Judged without `keep_distinct`, all others with it.
    "published default": [
        ("SELECT name FROM pet", "SELECT DISTINCT name FROM pet", RIGHT),
        ("SELECT DISTINCT name FROM pet", "SELECT name FROM pet", RIGHT),
        ("SELECT DISTINCT name FROM pet", "SELECT name FROM pet GROUP BY name", OTHER),
        ("SELECT count(kind) FROM pet", "SELECT count(DISTINCT kind) FROM pet", RIGHT),
        ("SELECT count(distinct kind) FROM pet", "SELECT 5", RIGHT),
        ("SELECT count(DISTINCT kind) FROM pet", "SELECT 3", OTHER),
        ("SELECT name FROM pet", "SELECT name FROM pet UNION SELECT name FROM pet", OTHER),
        ("SELECT 'distinct'", "SELECT ''", OTHER),
    ],
    "NULLs": [
        ("SELECT NULL", "SELECT NULL", RIGHT),
        ("SELECT NULL", "SELECT 0", OTHER),
        ("SELECT NULL", "SELECT ''", OTHER),
        ("SELECT NULL", "SELECT 'None'", OTHER),
        ("SELECT NULL", "SELECT 1 WHERE 0", OTHER),
        ("SELECT age FROM pet", "SELECT coalesce(age, 0) FROM pet", OTHER),
        ("SELECT age FROM pet WHERE age IS NULL", "SELECT age FROM pet WHERE age = NULL", OTHER),
        ("SELECT id FROM pet WHERE age IS NULL", "SELECT id FROM pet WHERE NOT age > 0 OR age IS NULL", RIGHT),
        ("SELECT count(*) FROM pet", "SELECT count(age) FROM pet", OTHER),
        ("SELECT city, name FROM owner", "SELECT name, city FROM owner", RIGHT),
        ("SELECT NULL, 1", "SELECT 1, NULL", RIGHT),
        ("SELECT NULL, NULL", "SELECT NULL, NULL", RIGHT),
        ("SELECT NULL, NULL", "SELECT NULL, 1", OTHER),
        ("SELECT max(a) FROM empty", "SELECT NULL", RIGHT),
        ("SELECT a FROM empty", "SELECT max(a) FROM empty", OTHER),
        ("SELECT id FROM pet WHERE owner_id NOT IN (1, NULL)", "SELECT id FROM pet WHERE 0", RIGHT),
        ("VALUES (1, NULL), (NULL, 2)", "VALUES (NULL, 1), (2, NULL)", RIGHT),
        ("VALUES (1, NULL), (NULL, 2)", "VALUES (1, 2), (NULL, NULL)", OTHER),
    ],
    "order and number of columns": [
        (ALL_PETS, "SELECT age, name FROM pet", RIGHT),
        (ALL_PETS, "SELECT name, age, age FROM pet", OTHER),
        (ALL_PETS, "SELECT name FROM pet", OTHER),
        (ALL_PETS, "SELECT name, name FROM pet", OTHER),
        (ALL_PETS, "SELECT name AS age, age AS name FROM pet", RIGHT),
        ("SELECT * FROM pet", "SELECT kind, weight, age, name, owner_id, id FROM pet", RIGHT),
        ("SELECT * FROM pet", "SELECT kind, weight, age, name, id, id FROM pet", OTHER),
        ("SELECT id, age, weight FROM pet", "SELECT weight, id, age FROM pet", RIGHT),
        ("VALUES (1, 2), (2, 1)", "VALUES (1, 1), (2, 2)", OTHER),
        ("VALUES (1, 2), (2, 1)", "VALUES (2, 1), (1, 2)", RIGHT),
        ("VALUES (1, 2), (3, 4)", "VALUES (2, 1), (3, 4)", OTHER),
        ("VALUES (1, 2), (3, 4)", "VALUES (2, 1), (4, 3)", RIGHT),
        ("VALUES (0, 1, 1), (1, 0, 1), (1, 1, 0)", "VALUES (1, 1, 0), (0, 1, 1), (1, 0, 1)", RIGHT),
        ("VALUES (0, 1, 1), (1, 0, 1), (1, 1, 0)", "VALUES (1, 1, 0), (0, 1, 1), (0, 1, 1)", OTHER),
        ("SELECT a, b, c FROM empty", "SELECT 1 WHERE 0", RIGHT),
        ("SELECT a, b FROM empty", "SELECT 1, 2", OTHER),
        (f"SELECT {', '.join(['1'] * 12)}", f"SELECT {', '.join(['1'] * 12)}", RIGHT),
        (f"SELECT {', '.join(['1'] * 12)}", f"SELECT {', '.join(['1'] * 11)}, 2", OTHER),
        (f"SELECT {', '.join(['age'] * 14)} FROM pet", f"SELECT {', '.join(['age'] * 14)} FROM pet", RIGHT),
        (f"SELECT {', '.join(['age'] * 14)} FROM pet", f"SELECT {', '.join(['age'] * 13)}, id FROM pet", OTHER),
    ],
    "numbers and texts": [
        ("SELECT 1", "SELECT 1.0", RIGHT),
        ("SELECT 1", "SELECT '1'", OTHER),
        ("SELECT 1", "SELECT 1 = 1", RIGHT),
        ("SELECT 0.3", "SELECT 0.1 + 0.2", OTHER),
        ("SELECT 0.5", "SELECT 0.25 + 0.25", RIGHT),
        ("SELECT 7 / 2", "SELECT 3", RIGHT),
        ("SELECT 7 / 2", "SELECT 7 / 2.0", OTHER),
        ("SELECT avg(age) FROM pet", "SELECT sum(age) * 1.0 / count(age) FROM pet", RIGHT),
        ("SELECT avg(age) FROM pet", "SELECT sum(age) * 1.0 / count(*) FROM pet", OTHER),
        ("SELECT 0.0", "SELECT -0.0", RIGHT),
        ("SELECT 9e999", "SELECT 9e998", RIGHT),
        ("SELECT 9e999", "SELECT -9e999", OTHER),
        ("SELECT 9007199254740993", "SELECT 9007199254740992.0", OTHER),
        ("SELECT 9223372036854775807", "SELECT 9223372036854775807", RIGHT),
        ("SELECT 1, 1.0", "SELECT 1.0, 1", RIGHT),
        ("SELECT 'a'", "SELECT 'A'", OTHER),
        ("SELECT 'a'", "SELECT 'a '", OTHER),
        ("SELECT 'é'", "SELECT char(233)", RIGHT),
        ("SELECT x'6f6b'", "SELECT 'ok'", OTHER),
        ("SELECT x'6f6b'", "SELECT a FROM bytes WHERE typeof(a) = 'blob'", RIGHT),
        ("SELECT 'ok'", "SELECT a FROM bytes WHERE typeof(a) = 'text'", RIGHT),
        ("SELECT weight FROM pet WHERE id = 2", "SELECT 4", RIGHT),
        ("SELECT CAST(4 AS TEXT)", "SELECT 4", OTHER),
    ],
    "joins, groups, sets and nesting": [
        ("SELECT T1.name FROM owner AS T1 JOIN pet AS T2 ON T1.id = T2.owner_id WHERE T2.kind = 'dog'",
         "SELECT name FROM owner WHERE id IN (SELECT owner_id FROM pet WHERE kind = 'dog')", RIGHT),
        ("SELECT T1.name FROM owner AS T1 JOIN pet AS T2 ON T1.id = T2.owner_id",
         "SELECT owner.name FROM pet, owner WHERE owner.id = pet.owner_id", RIGHT),
        ("SELECT T1.name FROM owner AS T1 JOIN pet AS T2 ON T1.id = T2.owner_id", "SELECT name FROM owner", OTHER),
        ("SELECT name FROM owner", "SELECT DISTINCT o.name FROM owner o LEFT JOIN pet p ON o.id = p.owner_id", RIGHT),
        ("SELECT count(*) FROM owner", "SELECT count(*) FROM owner JOIN pet", OTHER),
        ("SELECT kind, count(*) FROM pet GROUP BY kind", "SELECT count(id), kind FROM pet GROUP BY 2", RIGHT),
        ("SELECT kind, count(*) FROM pet GROUP BY kind", "SELECT kind, count(*) FROM pet GROUP BY name", OTHER),
        ("SELECT kind FROM pet GROUP BY kind HAVING count(*) > 1", "VALUES ('cat'), ('dog')", RIGHT),
        ("SELECT kind FROM pet GROUP BY kind HAVING count(*) >= 1", "VALUES ('cat'), ('dog')", OTHER),
        ("SELECT name FROM pet UNION SELECT name FROM owner",
         "SELECT name FROM owner UNION SELECT name FROM pet", RIGHT),
        ("SELECT name FROM pet UNION ALL SELECT name FROM owner",
         "SELECT name FROM owner UNION SELECT name FROM pet", OTHER),
        ("SELECT id FROM owner EXCEPT SELECT owner_id FROM pet", "SELECT 4", RIGHT),
        ("SELECT id FROM owner EXCEPT SELECT owner_id FROM pet",
         "SELECT owner_id FROM pet EXCEPT SELECT id FROM owner", OTHER),
        ("SELECT id FROM owner INTERSECT SELECT owner_id FROM pet",
         "SELECT DISTINCT owner_id FROM pet WHERE owner_id", RIGHT),
        ("SELECT name FROM pet WHERE age > (SELECT avg(age) FROM pet)", "SELECT name FROM pet WHERE age > 5.5", RIGHT),
        ("SELECT name FROM pet WHERE age > 5", "SELECT name FROM old", RIGHT),
        ("SELECT name FROM pet WHERE age > 5",
         "WITH o AS (SELECT * FROM pet) SELECT name FROM o WHERE age > 5", RIGHT),
        ("SELECT 10",
         "WITH RECURSIVE r(n) AS (SELECT 1 UNION SELECT n + 1 FROM r WHERE n < 10) SELECT max(n) FROM r", RIGHT),
        ("SELECT id FROM pet WHERE age BETWEEN 3 AND 7", "SELECT id FROM pet WHERE age >= 3 AND age <= 7", RIGHT),
        ("SELECT name FROM pet WHERE name LIKE '%e%'", "SELECT name FROM pet WHERE instr(name, 'e')", RIGHT),
        ("SELECT count(*) FROM pet WHERE EXISTS (SELECT 1)", "SELECT count(*) FROM pet", RIGHT),
        ("SELECT id, rank() OVER (ORDER BY id) FROM owner", "SELECT id, id FROM owner", RIGHT),
    ],
    "writing": [
        ("SELECT 3", "SELECT 3;", RIGHT),
        ("SELECT 3", " \n SELECT\t3 ; \n", RIGHT),
        ("SELECT 3", "SELECT 3; -- three", RIGHT),
        ("SELECT 3", "/* three */ SELECT /* is */ 3 /* it */;", RIGHT),
        ("SELECT 3", "sElEcT 3", RIGHT),
        ("SELECT 3", "SELECT 3 -- ; SELECT 4", RIGHT),
        ("SELECT 3;", "SELECT 3", RIGHT),
        ("SELECT ';'", "SELECT ';'", RIGHT),
        ("SELECT note FROM \"order\" WHERE id = 2", "SELECT 'a;b -- c'", RIGHT),
        ("SELECT note FROM \"order\" WHERE id = 1", "SELECT 'it''s'", RIGHT),
        ("SELECT note FROM \"order\" WHERE id = 1", 'SELECT "it\'s"', RIGHT),
        ("SELECT \"select\" FROM \"order\"", "SELECT `select` FROM [order]", RIGHT),
        ("SELECT name FROM pet WHERE kind = 'bird'", 'SELECT name FROM pet WHERE kind = "bird"', RIGHT),
        ("SELECT name FROM pet WHERE age >= 7", "SELECT name FROM pet WHERE age > = 7", RIGHT),
        ("SELECT name FROM pet WHERE age != 7", "SELECT name FROM pet WHERE age ! = 7", RIGHT),
        ("SELECT name FROM pet WHERE age < = 7", "SELECT name FROM pet WHERE age <= 7", RIGHT),
        ("SELECT name FROM pet WHERE age <> 7", "SELECT name FROM pet WHERE age != 7", RIGHT),
        ("SELECT '> ='", "SELECT '>='", OTHER),
        ("SELECT name FROM PET", "SELECT NAME FROM pet", RIGHT),
    ],
    "faults": [
        ("SELECT 1", "SELEC 1", "syntax error"),
        ("SELECT 1", "SELECT", "syntax error"),
        ("SELECT 1", "SELECT 1 FROM", "syntax error"),
        ("SELECT 1", "SELECT (1", "syntax error"),
        ("SELECT 1", "SELECT 'a", "syntax error"),
        ("SELECT 1", "SELECT 1 FROM pet WHERE", "syntax error"),
        ("SELECT 1", "How many are there?", "syntax error"),
        ("SELECT 1", "SELECT #", "syntax error"),
        ("SELECT 1", "SELECT 1 FROM dog", "unknown name"),
        ("SELECT 1", "SELECT height FROM pet", "unknown name"),
        ("SELECT 1", "SELECT pet.height FROM pet", "unknown name"),
        ("SELECT 1", "SELECT median(age) FROM pet", "unknown name"),
        ("SELECT 1", "SELECT name FROM pet JOIN owner", "error"),
        ("SELECT 1", "SELECT count(*, *) FROM pet", "syntax error"),
        ("SELECT 1", "SELECT 1 UNION SELECT 1, 2", "error"),
        ("SELECT 1", "SELECT sum(9223372036854775807) FROM pet", "error"),
        ("SELECT 1", "SELECT id FROM pet WHERE count(*) > 1", "error"),
        ("SELECT 1", "", "no query"),
        ("SELECT 1", " ; ", "no query"),
        ("SELECT 1", "-- nothing", "no query"),
        ("SELECT 1", "SELECT 1; SELECT 1", "several statements"),
        ("SELECT 1", "SELECT 1; DROP TABLE pet", "several statements"),
        ("SELECT 1", "SELECT 1; -- one\nDELETE FROM pet", "several statements"),
        ("SELECT 1", "SELECT 1\0", "error"),
        ("SELECT 1", "SELECT '\ud800'", "error"),
    ],
    "more than reading": [
        ("SELECT 1", query, "forbidden")
        for query in (
            "DELETE FROM pet",
            "DELETE FROM pet RETURNING 1",
            "UPDATE pet SET age = 0",
            "INSERT INTO pet (id) VALUES (9)",
            "INSERT INTO pet (id) SELECT 9",
            "REPLACE INTO pet (id) VALUES (1)",
            "WITH x AS (SELECT 1) DELETE FROM pet",
            "DROP TABLE pet",
            "DROP VIEW old",
            "ALTER TABLE pet ADD COLUMN x",
            "ALTER TABLE pet RENAME TO dog",
            "CREATE TABLE x (a)",
            "CREATE TABLE x AS SELECT 1",
            "CREATE TEMP TABLE x (a)",
            "CREATE TEMP VIEW x AS SELECT 1",
            "CREATE INDEX x ON pet (age)",
            "CREATE TRIGGER x AFTER INSERT ON pet BEGIN SELECT 1; END",
            "CREATE VIRTUAL TABLE x USING fts5(a)",
            "ATTACH 'other.sqlite' AS other",
            "ATTACH ':memory:' AS other",
            "DETACH main",
            "PRAGMA table_info(pet)",
            "PRAGMA query_only = 0",
            "PRAGMA journal_mode = WAL",
            "PRAGMA writable_schema = 1",
            "PRAGMA user_version = 7",
            "SELECT * FROM pragma_table_info('pet')",
            "VACUUM",
            "VACUUM INTO 'copy.sqlite'",
            "REINDEX",
            "ANALYZE",
            "BEGIN",
            "BEGIN IMMEDIATE",
            "COMMIT",
            "SAVEPOINT x",
            "EXPLAIN DELETE FROM pet",
            "SELECT load_extension('x')",
            "SELECT fts3_tokenizer('simple')",
            "SELECT 1 WHERE load_extension('x') IS NULL",
        )
    ],
    "limits": [
        ("SELECT 1", f"{ENDLESS} SELECT count(*) FROM r", "time"),
        ("SELECT 1", f"{ENDLESS} SELECT n FROM r WHERE n < 0", "time"),
        ("SELECT 1", f"SELECT 1 WHERE 0 IN ({ENDLESS} SELECT n FROM r)", "time"),
        ("SELECT 1",
         "SELECT count(*) FROM pet a, pet b, pet c, pet d, pet e, pet f, pet g, pet h, pet i, pet j, pet k", "time"),
        ("SELECT 1", f"{ENDLESS} SELECT n FROM r", "too many rows"),
        ("SELECT 1", "SELECT a.id FROM pet a, pet b, pet c, pet d, pet e, pet f, pet g", "too many rows"),
        ("SELECT 1", f"{ENDLESS} SELECT hex(zeroblob(90000)), n FROM r", "too large"),
        ("SELECT 1", "SELECT randomblob(1000000000)", "too large"),
        ("SELECT 1", "SELECT length(randomblob(1000000000))", "too large"),
        ("SELECT 1", "SELECT zeroblob(1000000000)", "too large"),
        ("SELECT 1", "SELECT hex(zeroblob(1000000000))", "too large"),
        # One call that nothing interrupts: its process is ended.
        ("SELECT 1", "SELECT printf('%.*c', 2000000000, 'x')", "time"),
        ("SELECT 1", "SELECT replace(hex(zeroblob(100000)), '0', hex(zeroblob(100000)))", "too large"),
        ("SELECT 1", "SELECT group_concat(hex(zeroblob(100000)), '') FROM pet a, pet b, pet c", "too large"),
        ("SELECT 1",
         "WITH RECURSIVE r(s) AS (SELECT 'ab' UNION ALL SELECT s || s FROM r) SELECT max(s) FROM r", "too large"),
        ("SELECT 0", "SELECT count(*) FROM pet WHERE 0", RIGHT),
    ],
}  # fmt: skip
ALL_PAIRS = [(topic, *pair) for topic, pairs in PAIRS.items() for pair in pairs]


def deep_queries(depth):
    """Queries on the table `pet` that an algorithm takes long over if it looks at parts of them more than once."""

    def nest(before, after):
        return before * depth + "age" + after * depth

    return {
        "equations": f"SELECT 1 FROM pet WHERE age {'= age ' * depth}",
        "comparisons": f"SELECT 1 FROM pet WHERE {nest('(age > ', ')')}",
        "IN": f"SELECT 1 FROM pet WHERE {nest('age IN (', ')')}",
        "BETWEEN": f"SELECT 1 FROM pet WHERE {nest('age BETWEEN 1 AND (', ')')}",
        "minus": f"SELECT 1 FROM pet WHERE age > {nest('-(', ')')}",
        "subqueries": f"SELECT 1 FROM pet WHERE {nest('age IN (SELECT id FROM pet WHERE ', ')')}",
        "tables": f"SELECT 1 FROM {'(SELECT * FROM ' * depth}pet{' UNION SELECT 1 ORDER BY 1)' * depth}",
        "aliases": f"SELECT age AS x0{''.join(f', x{i} + x{i} AS x{i + 1}' for i in range(depth))} FROM pet",
        "joins": "SELECT 1 FROM pet p"
        + "".join(f" JOIN pet p{i} ON p.id IN (SELECT age + {i} FROM pet)" for i in range(depth)),
    }
