"""The examples' data, prompts and judgements; all steps at a tiny size."""

import hashlib
import json
import random
import re
import sqlite3
import sys
import types

import pytest
import yaml
from pipelines import ROOT, SCHEMAS, SHARED, load_example, write_gsm8k, write_spider
from tasks.options import read_options


CONFIGS = sorted((ROOT / "examples" / "configs").glob("*.yaml"))
EXAMPLES = {"gsm8k": "GSM8K", "spider": "Spider", "sharegpt": "ShareGPT", "codesearchnet": "CodeSearchNet"}


def task_of(name):
    return getattr(load_example(name), EXAMPLES[name])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_can_be_read(path, monkeypatch):
    """Without asking whether this machine has a GPU for it."""
    changes = ["sft.use_cpu=true", "train.use_cpu=true"]
    options = read_options(task_of(path.stem.split("-")[0]), path, changes)
    assert str(options.output_dir).startswith("runs/") and options.block_size
    assert options.dependencies["model"] and yaml.safe_load(path.read_text())["train"]


def test_gsm8k_problems(tmp_path):
    kind = task_of("gsm8k")
    data = str(write_gsm8k(tmp_path / "data"))
    train, test = kind(data=data).load("train"), kind(data=data).load("test")
    assert (len(train), len(test)) == (12, 6)
    assert train[0].prompt == "Ann has 2 pens and buys 12 more. How many has she?\n"
    assert train[0].response == "She has 2+12=<<2+12=14>>14.\n#### 14"
    assert kind(data=data, calculator=False).load("train")[0].response == "She has 2+12=14.\n#### 14"
    (message,) = kind(data=data, chat=True).load("train")[0].prompt
    assert message["role"] == "user" and re.fullmatch(
        re.escape(train[0].prompt) + r"\nSolve this .* step\.", message["content"]
    )
    answers = [problem.response for problem in test]
    answers[0] = "I do not know"
    answers[1] = answers[1].replace("####", "#### $") + ".00"
    assert [judgement.is_right for judgement in kind().judge(answers, test)] == [False] + [True] * 5
    (tmp_path / "data" / "test.jsonl").write_text('{"question": "?"}\n')
    with pytest.raises(ValueError, match="Line 1 of .*must be an object with `question`, `answer`"):
        kind(data=data).load("test")


def test_spider_problems(tmp_path):
    kind = task_of("spider")
    data = str(write_spider(tmp_path / "data"))
    train, test = kind(data=data).load("train"), kind(data=data).load("test")
    assert (len(train), len(test)) == (8, 5)
    schema = "owner:owner_id,Name|pet:pet_id,owner_id,weight"
    assert train[0].prompt == f"{schema}\nWhich pets weigh over 0?\n"
    assert test[1].prompt == "shop:shop_id,city,year opened\nWhich shops are in 1?\n"
    assert test[1].response == "SELECT shop_id FROM shop WHERE city = 1"
    (message,) = kind(data=data, chat=True).load("test")[1].prompt
    assert message["content"].startswith("CREATE TABLE shop (\n  shop_id INTEGER,\n  city INTEGER,")
    (message,) = kind(data=data, chat=True, example_values=2).load("test")[1].prompt
    assert message["content"].startswith("CREATE TABLE shop (\n  shop_id INTEGER, -- 0, 1\n  city INTEGER, -- 0, 1\n")
    (tmp_path / "data" / "tables.json").unlink()  # then the schema is read from the database
    assert [problem.prompt for problem in kind(data=data).load("train")] == [problem.prompt for problem in train]
    chats = kind(data=data, chat=True).load("test")
    assert [one.response for one in chats] == [one.response for one in test]
    (message,) = chats[1].prompt
    tables = 'CREATE TABLE shop (\n  shop_id,\n  city,\n  "year opened"\n);'
    assert message["role"] == "user" and message["content"].startswith(f"{tables}\n\nWrite one SQLite query ")
    assert message["content"].endswith("\n\nQuestion: Which shops are in 1?")
    lower = kind(data=data, lower_case=True).load("train")[0]
    assert (
        lower.prompt == f"{schema.lower()}\nWhich pets weigh over 0?\n" and lower.response == train[0].response.lower()
    )
    limit = len(train[0].prompt) - 1
    assert not kind(data=data, max_prompt_chars=limit).load("train")
    assert len(kind(data=data, max_prompt_chars=1).load("test")) == 5


def test_spider_without_databases_nor_tables_says_what_is_needed(tmp_path):
    data = write_spider(tmp_path / "data")
    (tmp_path / "data" / "tables.json").unlink()
    (data / "database").rename(tmp_path / "elsewhere")
    kind = task_of("spider")
    with pytest.raises(ValueError, match="schema of the database 'pets'.*`--data` or `--databases`"):
        kind(data=str(data)).load("train")
    assert len(kind(data=str(data), databases=str(tmp_path / "elsewhere")).load("train")) == 8


def test_schemas_are_shuffled_anew_in_every_copy(tmp_path):
    data = str(write_spider(tmp_path / "data"))
    kind = task_of("spider")
    plain, shuffled = kind(data=data).load("train"), kind(data=data, schema_shuffles=9).load("train")
    assert len(shuffled) == 9 * len(plain)
    assert [one.prompt for one in shuffled] == [one.prompt for one in kind(data=data, schema_shuffles=9).load("train")]
    assert [one.prompt for one in shuffled] != [
        one.prompt for one in kind(data=data, seed=1, schema_shuffles=9).load("train")
    ]
    orders = set()
    for number, problem in enumerate(shuffled):
        schema, question, _ = problem.prompt.split("\n")
        tables = dict(part.split(":") for part in schema.split("|"))
        assert {name: sorted(columns.split(",")) for name, columns in tables.items()} == {
            name: sorted(columns) for name, columns in SCHEMAS["pets"].items()
        }
        assert question in plain[number % len(plain)].prompt
        assert problem.response == plain[number % len(plain)].response
        orders.add(schema)
    assert len(orders) > 6  # of 2 * 2 * 6
    test = kind(data=data, schema_shuffles=9).load("test")
    assert [one.prompt for one in test] == [one.prompt for one in kind(data=data).load("test")]


def test_a_database_on_both_sides_is_refused(tmp_path):
    data = write_spider(tmp_path / "data")
    rows = json.loads((data / "dev.json").read_text())
    rows[2]["db_id"] = "pets"
    (data / "dev.json").write_text(json.dumps(rows))
    for split in ("train", "test"):
        with pytest.raises(ValueError, match="different databases, got 1 in both, such as 'pets'"):
            task_of("spider")(data=str(data)).load(split)


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("SELECT  a ,b\n FROM t ; ", "SELECT a,b FROM t"),
        ("SELECT count( * ) FROM t", "SELECT count(*) FROM t"),
        ("SELECT a FROM t WHERE b = 'x  , y ( z'", "SELECT a FROM t WHERE b = 'x  , y ( z'"),
        ('SELECT a FROM t WHERE b = " ;"', 'SELECT a FROM t WHERE b = " ;"'),
        ("SELECT a , ( SELECT 1 )", "SELECT a, (SELECT 1)"),
    ],
)
def test_normalized_queries(query, expected):
    normalize = load_example("spider").normalize_sql
    assert normalize(query) == expected == normalize(expected)


def test_queries_in_lower_case_keep_what_is_quoted():
    normalize = load_example("spider").normalize_sql
    query = "SELECT  T1.Name FROM Pet AS T1 WHERE T1.Kind = 'Small  Dog' OR Name LIKE \"%Rex%\" ;"
    expected = "select t1.name from pet as t1 where t1.kind = 'Small  Dog' or name like \"%Rex%\""
    assert normalize(query, lower_case=True) == expected == normalize(expected, lower_case=True)


def test_spider_judges_by_what_is_returned(tmp_path):
    data = write_spider(tmp_path / "data")
    kind = task_of("spider")
    problems = kind(data=str(data)).load("test")[:3]
    before = {path: hashlib.sha256(path.read_bytes()).digest() for path in data.rglob("*") if path.is_file()}
    answers = ["SELECT s.shop_id FROM shop AS s WHERE 0 = s.city", "SELECT city FROM nowhere", "DROP TABLE shop"]
    judgements = kind(data=str(data)).judge(answers, problems)
    assert [judgement.is_right for judgement in judgements] == [True, False, False]
    assert before == {path: hashlib.sha256(path.read_bytes()).digest() for path in data.rglob("*") if path.is_file()}


def test_spider_without_databases_compares_clauses(tmp_path):
    pytest.importorskip("sqlglot")
    data = write_spider(tmp_path / "data")
    (data / "database").rename(tmp_path / "elsewhere")
    task = task_of("spider")(data=str(data))
    problems = task.load("test")[:2]
    answers = ["select SHOP_ID from shop where city = 5", "SELECT city FROM shop"]
    assert [judgement.is_right for judgement in task.judge(answers, problems)] == [True, False]
    assert task.judged_by == "clauses"
    assert task_of("spider")(data=str(data), databases=str(tmp_path / "elsewhere")).judged_by == "execution"


def test_spider_needs_all_databases_or_none(tmp_path):
    """Otherwise some answers were judged by what they return, others by their clauses."""
    data = write_spider(tmp_path / "data")
    rows = json.loads((data / "dev.json").read_text())
    rows[2]["db_id"] = "books"
    (data / "dev.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match="each of the 2 databases.*none for 1, such as 'books'.*`--databases`"):
        task_of("spider")(data=str(data)).load("test")
    with pytest.raises(ValueError, match="none for 2"):
        task_of("spider")(data=str(data), databases=str(tmp_path / "typo")).load("test")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gsm8k", "spider"])
def test_all_steps_at_a_tiny_size(tmp_path, name, capsys):
    data = (write_gsm8k if name == "gsm8k" else write_spider)(tmp_path / "data")
    run_all(name, data, tmp_path / "run", capsys)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gsm8k", "spider"])
def test_all_steps_on_the_real_data(tmp_path, name, capsys):
    if not (SHARED / name).is_dir():
        pytest.skip(f"needs {SHARED / name}")
    run_all(name, SHARED / name, tmp_path / "run", capsys)


def run_all(name, data, folder, capsys):
    module = load_example(name)
    config = ROOT / "examples" / "configs" / f"{name}-tiny.yaml"
    arguments = ["all", "--data", str(data), "--output-dir", str(folder)]
    assert module.main(task_of(name), config, arguments) == 0, capsys.readouterr().err
    text = capsys.readouterr().out
    assert re.findall(r"\[(\d)/4\]", text) == ["1", "1", "2", "3", "4"]
    report = json.loads((folder / "report.json").read_text())
    names = [row["name"] for row in report["comparison"]["rows"]]
    assert names[0] == "target model, generate()" and names[-1].startswith("CLLM, jacobi")
    assert all(row["accuracy"] is not None for row in report["comparison"]["rows"])
    assert "| `sft.max_steps` | `4` |" in (folder / "report.md").read_text()
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")
    assert module.main(task_of(name), config, arguments) == 0
    assert capsys.readouterr().out.count("is complete") == 5


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "spider").is_dir(), reason="needs the data")
def test_the_real_spider(tmp_path):
    task = task_of("spider")(data=str(SHARED / "spider"))
    train, test = task.load("train"), task.load("test")
    assert (len(train), len(test)) == (7000, 1034)
    assert not {problem.prompt.split("\n")[0] for problem in train} & {
        problem.prompt.split("\n")[0] for problem in test
    }
    module = load_example("spider")
    schema = module.schema_of_database(SHARED / "spider" / "database" / "car_1" / "car_1.sqlite")
    entry = next(one for one in json.loads((SHARED / "spider" / "tables.json").read_text()) if one["db_id"] == "car_1")
    lowered = {table.lower(): {column.lower() for column in columns} for table, columns in schema}
    expected = {table.lower(): {column.lower() for column in columns} for table, columns in module.read_schema(entry)}
    assert lowered == expected
    with sqlite3.connect(":memory:") as connection:  # still SQL: what is wrong is only that there are no tables
        for problem in random.Random(0).sample(test, 50):
            with pytest.raises(sqlite3.OperationalError, match="no such table"):
                connection.execute(problem.response)


def test_first_turns_of_chats(tmp_path):
    human, gpt = {"from": "human", "value": " Hi? "}, {"from": "gpt", "value": "Hello."}
    chats = [[human, gpt, human], [gpt, human], [human], [], [{"from": "human", "value": "long" * 600}, gpt]]
    (tmp_path / "train.json").write_text(json.dumps([{"id": "1", "conversations": chat} for chat in chats]))
    (tmp_path / "test.jsonl").write_text('{"turns": ["Why?", "And?"]}\n\n{"prompt": ["How?"]}\n')
    kind = task_of("sharegpt")
    task = kind(data=str(tmp_path))
    (problem,) = task.load("train")
    assert problem.prompt == [{"role": "user", "content": "Hi?"}] and problem.response == "Hello."
    assert [one.prompt for one in kind(data=str(tmp_path), chat=False).load("test")] == ["Why?\n", "How?\n"]
    assert not task.has_metric and task_of("gsm8k")().has_metric
    (tmp_path / "test.jsonl").write_text('{"question": "How?"}\n')
    with pytest.raises(ValueError, match="a list of texts in `prompt` or `turns`, got {'question': 'How"):
        task.load("test")
    for chat in (["hi", "there"], [{**human, "value": 5}, gpt], {"from": "human"}):
        (tmp_path / "train.json").write_text(json.dumps([{"conversations": chat}]))
        with pytest.raises(ValueError, match="`conversations` must be a list of objects with texts"):
            task.load("train")


def test_functions_without_their_documentation(tmp_path):
    code = 'def add(a, b):\n    """\n    Add.\n    """\n    # both\n    return a + b\n'
    rows = [
        ("Add.\n\nTwo numbers.", code),
        ("Old.", "def f():\n    print 1"),
        ("", code),
        ("Long.", code + "#" * 1500),
    ]
    lines = [json.dumps({"docstring": docstring, "code": code}) for docstring, code in rows]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    (problem,) = task_of("codesearchnet")(data=str(tmp_path)).load("train")
    assert problem.prompt == "# Add.\n#\n# Two numbers.\n"
    assert problem.response == "def add(a, b):\n    # both\n    return a + b"
    strip = load_example("codesearchnet").without_docstring
    assert strip("def f(): 'x'") is None and strip("x = 1") is None and strip("def f():\n    'x'; return 1") is None
    assert strip("def f():\n    'x'\n    a = '\\x0c'\n    return a") == "def f():\n    a = '\\x0c'\n    return a"
    assert strip("def f(a='\x0c'):\n    'x'\n    return a") == "def f(a='\x0c'):\n    return a"
    assert strip("def f():\n    return 1\n") == "def f():\n    return 1"


def test_the_task_of_the_guide(monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "examples.md").read_text(), flags=re.DOTALL)
    module = types.ModuleType("sums")
    monkeypatch.setitem(sys.modules, "sums", module)
    exec(compile(code, "examples.md", "exec"), module.__dict__)
    task = module.Sums(largest=10)
    train, test = task.load("train"), task.load("test")
    assert len(train) + len(test) == 100 and not {one.prompt for one in train} & {one.prompt for one in test}
    judgements = task.judge([*(one.response for one in test[:3]), "", "0 + 4 = 5"], test[:5])
    assert [judgement.is_right for judgement in judgements] == [True] * 3 + [False] * 2
