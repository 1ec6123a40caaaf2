"""
The process in which untrusted SQL runs, so that it can be ended in the middle of a call that nothing else can stop.

`sql.QueryRunner` starts this file as a script, isolated from the environment and without site packages; it imports the
standard library alone. A request is a line of JSON on standard input. Its answer are lines of JSON on standard output:
first some with `rows` alone, where there are many, so that nobody has to hold all of them as text; then one with the
`kind`, and with the last rows.
"""

from __future__ import annotations

import json
import signal
import sqlite3
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


READY = "ready\n"
_READING = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
_FORBIDDEN_FUNCTIONS = {"load_extension", "fts3_tokenizer"}
_STEPS_BETWEEN_LOOKS = 1000  # instructions of SQLite's virtual machine: well under a millisecond
# Longer than whoever asks waits before it ends this process; for where it is gone itself.
_ALONE_AFTER = 10.0  # seconds beyond those of a query
_PART_BYTES = 2**18  # of the rows that are sent together
_JOURNAL_MAGIC = bytes.fromhex("d9d505f920a163d7")


class Refusal(Exception):
    """
    The query has no rows to give back.

    Args:
        kind (`str`): see `sql.QueryResult`.
        message (`str`): the reason.
    """

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


class Guard:
    """
    What SQLite asks while it works.

    Args:
        seconds (`float`): time from now after which a query is interrupted.
    """

    def __init__(self, seconds: float):
        self._end = time.monotonic() + seconds
        self.has_forbidden = False
        self.has_timed_out = False

    def authorize(self, action: int, first: str | None, second: str | None, *_: str | None) -> int:
        """Called for everything that a statement would do, while it is compiled."""
        if action in _READING and not (
            action == sqlite3.SQLITE_FUNCTION and str(second).lower() in _FORBIDDEN_FUNCTIONS
        ):
            return sqlite3.SQLITE_OK
        self.has_forbidden = True
        return sqlite3.SQLITE_DENY

    def is_late(self) -> bool:
        """Called every so many instructions; `True` interrupts the query."""
        self.has_timed_out = time.monotonic() > self._end
        return self.has_timed_out


def answer(
    database: str, query: str, limits: dict[str, Any], send: Callable[[list[list[Any]]], object] | None = None
) -> dict[str, Any]:
    """
    Run one query.

    Args:
        database (`str`): path of an SQLite file.
        query (`str`): SQL.
        limits (`dict`): fields of `sql.QueryLimits`.
        send (`Callable`, *optional*): takes rows in parts while they come. By default all are returned.

    Returns:
        `dict`: fields of `sql.QueryResult`, with values that JSON knows; the rows that have not been sent.
    """
    guard = Guard(limits["seconds"])
    connection = None
    try:
        connection = open_database(Path(database), limits)
        connection.set_authorizer(guard.authorize)
        connection.set_progress_handler(guard.is_late, _STEPS_BETWEEN_LOOKS)
        columns, rows = fetch(connection, query, limits, send)
        return {"kind": "rows", "columns": columns, "rows": rows}
    except Exception as error:  # whatever SQLite or Python finds wrong with a query is a kind of answer
        return {"kind": kind_of(error, guard), "message": f"{type(error).__name__}: {error}"}
    finally:
        if connection is not None:
            connection.close()


def open_database(path: Path, limits: dict[str, Any]) -> sqlite3.Connection:
    """
    Open a file so that neither it nor its folder can change: `immutable` takes no locks and writes no `-shm` file.

    Args:
        path (`Path`): of the file.
        limits (`dict`): fields of `sql.QueryLimits`.

    Returns:
        `sqlite3.Connection`: only reading, its temporary tables in memory.

    Raises:
        Refusal: if there is no such file, if it is no SQLite database, or if some of its content stands in a log
            beside it.
    """
    if not path.is_file():
        raise Refusal("no database", f"there is no file {str(path)!r}")
    for log in unmerged_logs(path):
        raise Refusal(
            "database in use",
            f"{log.name!r} holds changes that are not in the database yet; close the connection that writes to it, or "
            "let it run `PRAGMA wal_checkpoint(TRUNCATE)`",
        )
    connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro&immutable=1", uri=True, isolation_level=None)
    try:
        connection.execute("PRAGMA query_only = 1")
        connection.execute("PRAGMA temp_store = 2")
        # Can only be lowered, and holds for the whole process.
        connection.execute(f"PRAGMA hard_heap_limit = {int(limits['max_memory'])}")
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.Error as error:
        connection.close()
        raise Refusal("no database", f"{str(path)!r} cannot be read: {error}") from error
    connection.text_factory = lambda text: text.decode(errors="ignore")
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, int(limits["max_value_bytes"]))
    return connection


def unmerged_logs(path: Path) -> list[Path]:
    """
    Logs of SQLite beside a database without which it is not to be read.

    Args:
        path (`Path`): of the database.

    Returns:
        `list[Path]`: a write-ahead log with content, a rollback journal that has not been ended.
    """
    log, journal = path.with_name(path.name + "-wal"), path.with_name(path.name + "-journal")
    logs = [log] if log.is_file() and log.stat().st_size else []
    if journal.is_file():
        with journal.open("rb") as file:
            # The journal that `journal_mode=PERSIST` leaves behind begins with zeros.
            logs += [journal] if file.read(len(_JOURNAL_MAGIC)) == _JOURNAL_MAGIC else []
    return logs


def fetch(
    connection: sqlite3.Connection,
    query: str,
    limits: dict[str, Any],
    send: Callable[[list[list[Any]]], object] | None = None,
) -> tuple[list[str], list[list[Any]]]:
    """
    Run a query and take its rows one by one.

    Args:
        connection (`sqlite3.Connection`): to the database.
        query (`str`): SQL.
        limits (`dict`): fields of `sql.QueryLimits`.
        send (`Callable`, *optional*): takes rows in parts.

    Returns:
        `tuple[list[str], list[list[Any]]]`: names of the columns; the rows that have not been sent, bytes as
            `{"hex": ...}`.

    Raises:
        Refusal: if there is no query, or more rows or bytes than allowed.
        sqlite3.Error: if SQLite finds a fault, or is interrupted.
    """
    cursor = connection.execute(query)
    if cursor.description is None:
        raise Refusal("no query", "there is no statement")
    columns = [name for name, *_ in cursor.description]
    rows: list[list[Any]] = []
    num_bytes = sum(map(len, columns))
    num_rows = num_sent = 0
    for row in cursor:
        if num_rows == limits["max_rows"]:
            raise Refusal("too many rows", f"there are more than {limits['max_rows']:,} rows")
        num_rows += 1
        num_bytes += sys.getsizeof(row) + sum(map(sys.getsizeof, row))
        if num_bytes > limits["max_bytes"]:
            raise Refusal("too large", f"the rows take more than {limits['max_bytes']:,} bytes")
        rows.append([{"hex": value.hex()} if isinstance(value, bytes) else value for value in row])
        if send is not None and num_bytes - num_sent > _PART_BYTES:
            send(rows)
            rows, num_sent = [], num_bytes
    return columns, rows


def kind_of(error: Exception, guard: Guard) -> str:
    """
    Why there are no rows.

    Args:
        error (`Exception`): what was raised.
        guard (`Guard`): of the query.

    Returns:
        `str`: a kind of `sql.QueryResult`.
    """
    message = str(error)
    if isinstance(error, Refusal):
        return error.kind
    if guard.has_forbidden:
        return "forbidden"
    if guard.has_timed_out:
        return "time"
    if isinstance(error, (MemoryError, sqlite3.DataError)):
        return "too large"
    if "one statement" in message:
        return "several statements"
    if message.startswith("no such"):
        return "unknown name"
    if "syntax error" in message or "incomplete input" in message or "unrecognized token" in message:
        return "syntax error"
    return "error"


def _end_after(seconds: float) -> None:
    """Have this process ended by its system, in the middle of whatever call; 0 takes that back."""
    if hasattr(signal, "setitimer"):  # Windows has none
        signal.setitimer(signal.ITIMER_REAL, seconds)


def _write(fields: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(fields) + "\n")


def main() -> None:
    """Answer requests until there are no more."""
    limits = json.loads(sys.argv[1])
    # Ctrl-C in a terminal is for the process that asks. It ends this one, if it does not go on.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stdout.write(READY)
    sys.stdout.flush()
    for line in sys.stdin:
        request = json.loads(line)
        _end_after(limits["seconds"] + _ALONE_AFTER)
        _write(answer(request["database"], request["query"], limits, lambda rows: _write({"rows": rows})))
        sys.stdout.flush()
        _end_after(0)


if __name__ == "__main__":
    main()
