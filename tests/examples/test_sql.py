"""Untrusted SQL: what comes back, what is refused, and that no file changes."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import tracemalloc
from dataclasses import asdict

import pytest
from metrics.spider_accuracy import sql, sql_worker
from metrics.spider_accuracy.sql import QueryLimits, QueryRunner, run_query
from sql_pairs import ENDLESS, make_databases


@pytest.fixture(scope="module")
def databases(tmp_path_factory):
    return make_databases(tmp_path_factory.mktemp("databases"))


@pytest.fixture(scope="module")
def runner():
    with QueryRunner(QueryLimits(seconds=60)) as runner:
        yield runner


def test_columns_and_rows_come_in_order(databases, runner):
    result = runner.run(databases[0], "SELECT name, age AS years, weight FROM pet ORDER BY id LIMIT 2")
    assert (result.kind, result.columns) == ("rows", ["name", "years", "weight"])
    assert result.rows == [("Rex", 3, 10.5), ("Tom", 7, 4.0)]
    assert [type(value) for value in result.rows[0]] == [str, int, float]
    assert runner.run(databases[0], "SELECT a FROM empty").columns == ["a"]
    values = runner.run(databases[0], "SELECT NULL, x'00ff', '\"é\n', 9e999, 9223372036854775807, a FROM bytes").rows
    assert values[0] == (None, b"\x00\xff", '"é\n', float("inf"), 2**63 - 1, "ok")
    assert values[1][-1] == b"ok"


def test_names_of_files_are_not_part_of_an_address(databases, runner):
    assert runner.run(str(databases[1]), "SELECT a FROM t").rows == [(1,)]


def test_what_is_no_database_is_said_to_be_none(runner, tmp_path):
    text = tmp_path / "text.sqlite"
    text.write_text("no database" * 100)
    for path in (tmp_path / "missing.sqlite", tmp_path, text):
        result = runner.run(path, "SELECT 1")
        assert (result.kind, result.rows) == ("no database", []) and str(path) in result.message
    assert [path.name for path in tmp_path.iterdir()] == ["text.sqlite"]


@pytest.mark.parametrize("mode", ["wal", "persist", "truncate", "delete"])
def test_logs_of_other_connections_are_respected(mode, runner, tmp_path):
    """Without the log, the file lacks what the other connection has written, or holds what it may take back."""
    path = tmp_path / "busy.sqlite"
    other = sqlite3.connect(path, isolation_level=None)
    other.execute(f"PRAGMA journal_mode = {mode}")
    other.execute("CREATE TABLE t (a)")
    other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    assert runner.run(path, "SELECT count(*) FROM t").rows == [(0,)]
    other.execute("PRAGMA cache_size = 1")
    other.execute("BEGIN IMMEDIATE")
    other.executemany("INSERT INTO t VALUES (?)", [("x" * 2000,)] * 20)  # more than the cache holds
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    assert runner.run(path, "SELECT count(*) FROM t").kind == "database in use"
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
    other.execute("COMMIT")
    if mode == "wal":
        assert runner.run(path, "SELECT count(*) FROM t").kind == "database in use"
        other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    assert runner.run(path, "SELECT count(*) FROM t").rows == [(20,)]
    other.close()
    assert runner.run(path, "SELECT count(*) FROM t").rows == [(20,)]
    assert not [file for file in tmp_path.iterdir() if file.name.endswith(("-wal", "-shm"))]


@pytest.mark.parametrize(
    ("limits", "query", "kind"),
    [
        ({"seconds": 0.2}, f"{ENDLESS} SELECT count(*) FROM r", "time"),
        ({"max_rows": 4}, "SELECT id FROM pet", "too many rows"),
        ({"max_rows": 5}, "SELECT id FROM pet", "rows"),
        ({"max_bytes": 2000}, f"{ENDLESS} SELECT n FROM r LIMIT 200", "too large"),
        ({"max_bytes": 20_000}, f"{ENDLESS} SELECT NULL FROM r LIMIT 400", "too large"),
        ({"max_value_bytes": 100}, "SELECT zeroblob(101)", "too large"),
        ({"max_value_bytes": 100}, "SELECT zeroblob(99)", "rows"),
        ({"max_value_bytes": 2**30, "max_memory": 2**24}, "SELECT length(hex(randomblob(20000000)))", "too large"),
        ({"max_value_bytes": 2**30, "max_memory": 2**23}, f"{ENDLESS} SELECT n FROM r ORDER BY n DESC", "too large"),
    ],
)
def test_limits_hold(limits, query, kind, databases):
    if "max_value_bytes" in limits and sys.version_info < (3, 11) and "max_memory" not in limits:
        pytest.skip("Python 3.10 cannot limit a value")
    result = run_query(databases[0], query, QueryLimits(**{"seconds": 30, **limits}))
    assert (result.kind, bool(result.message)) == (kind, kind != "rows")


def test_a_query_that_is_too_long_is_not_sent(databases, runner):
    assert runner.run(databases[0], "SELECT 1" + " " * 99_992).kind == "rows"
    assert runner.run(databases[0], "SELECT 1" + " " * 99_993).kind == "too large"


def test_large_results_come_in_parts(databases, runner):
    """Of empty blobs, whose encoding is many times their size, and of letters that are escaped."""
    query = f"{ENDLESS} SELECT n, x'', char(233) || n, NULL FROM r LIMIT 20000"
    result = runner.run(databases[0], query)
    assert result.rows == [(n, b"", f"é{n}", None) for n in range(1, 20001)]
    parts = []
    limits = {**asdict(runner.limits), "max_bytes": 10**6}
    answer = sql_worker.answer(str(databases[0]), f"{ENDLESS} SELECT n, zeroblob(9000) FROM r", limits, parts.append)
    assert answer["kind"] == "too large" and "rows" not in answer
    assert len(parts) > 1 and max(len(json.dumps(part)) for part in parts) < 3 * sql_worker._PART_BYTES
    assert runner.run(databases[0], f"{ENDLESS} SELECT n, zeroblob(900000) FROM r").rows == []


def test_a_result_takes_little_more_memory_than_its_limit(databases, runner):
    query = f"{ENDLESS} SELECT n, {', '.join(['zeroblob(1)'] * 10)} FROM r LIMIT 5000"
    runner.run(databases[0], query)
    tracemalloc.start()
    try:
        rows = runner.run(databases[0], query).rows
        counted = sum(sys.getsizeof(row) + sum(map(sys.getsizeof, row)) for row in rows)
        assert tracemalloc.get_traced_memory()[1] < 2 * counted
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["seconds", "max_rows", "max_bytes", "max_value_bytes", "max_memory"])
def test_limits_must_be_positive(name):
    for value in (0, -1, float("nan")):
        with pytest.raises(ValueError, match=f"`{name}` must be positive, got {value}"):
            QueryLimits(**{name: value})


def test_a_query_that_nothing_interrupts_is_ended_and_the_next_one_runs(databases, monkeypatch):
    monkeypatch.setattr(sql, "_GRACE", 0.3)
    with QueryRunner(QueryLimits(seconds=0.1)) as runner:
        result = runner.run(databases[0], "SELECT printf('%.*c', 2000000000, 'x')")
        assert result.kind == "time" and "does not stop" in result.message
        runner.limits = QueryLimits(seconds=60)  # of the process that is started now
        assert runner.run(databases[0], "SELECT 1").rows == [(1,)]


def test_a_process_that_dies_or_is_left_waiting_is_replaced(databases, monkeypatch):
    with QueryRunner() as runner:
        assert runner.run(databases[0], "SELECT 1").rows == [(1,)]
        runner._process.kill()
        runner._process.wait()
        assert runner.run(databases[0], "SELECT 2").rows == [(2,)]
        with monkeypatch.context() as context:  # as if it ended in the middle of a query
            context.setattr(runner._process, "poll", lambda: None)
            runner._process.kill()
            runner._process.wait()
            assert runner.run(databases[0], "SELECT 2").kind == "error"
        assert runner.run(databases[0], "SELECT 3").rows == [(3,)]
        with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
            context.setattr(runner._process.stdout, "readline", _interrupt, raising=False)
            runner.run(databases[0], "SELECT 4")
        assert runner.run(databases[0], "SELECT 5").rows == [(5,)]
        process = runner._process
    assert process.poll() is not None


@pytest.mark.skipif(os.name != "posix", reason="signals are sent in other ways there")
def test_ctrl_c_is_for_the_process_that_asks(databases):
    """A terminal sends it to both; a caller that goes on must not find its next query judged an error."""
    with QueryRunner() as runner:
        assert runner.run(databases[0], "SELECT 1").rows == [(1,)]
        process = runner._process
        process.send_signal(signal.SIGINT)
        assert runner.run(databases[0], "SELECT 2").rows == [(2,)]
        assert runner._process is process and process.poll() is None


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system cannot end a process after a time")
def test_a_process_that_is_left_alone_in_a_query_ends(databases):
    code = "import sql_worker; sql_worker._ALONE_AFTER = -0.9; sql_worker.main()"
    path = [sys.executable, "-S", "-c", code]
    limits = json.dumps({"seconds": 1, "max_rows": 2, "max_bytes": 1, "max_value_bytes": 2**20, "max_memory": 2**40})
    request = json.dumps({"database": str(databases[0]), "query": "SELECT printf('%.*c', 2000000000, 'x')"})
    folder = os.path.dirname(sql_worker.__file__)
    result = subprocess.run([*path, limits], input=request, cwd=folder, capture_output=True, text=True)
    assert result.stdout == sql_worker.READY and result.returncode == -signal.SIGALRM


def _interrupt():
    raise KeyboardInterrupt


def test_the_process_imports_the_standard_library_alone(databases):
    code = f"import runpy; runpy.run_path({sql_worker.__file__!r})"
    assert subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True).returncode == 0
    limits = {"seconds": 60, "max_rows": 2, "max_bytes": 10**6, "max_value_bytes": 10**6, "max_memory": 2**40}
    answer = sql_worker.answer(str(databases[0]), "SELECT x'00', 1 FROM pet LIMIT 1", limits)
    assert json.loads(json.dumps(answer)) == {
        "kind": "rows",
        "columns": ["x'00'", "1"],
        "rows": [[{"hex": "00"}, 1]],
    }
