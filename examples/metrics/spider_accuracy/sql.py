"""
Running SQL that a model has written.

Nothing in such a query is trusted. SQLite opens the file read-only and immutable, compiles one statement that may only
read, and is interrupted after a time; and all of this happens in a process of its own, because single calls inside
SQLite (one `printf` or `instr` over large values) cannot be interrupted and go on for minutes: there the process is
ended.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from .sql_text import MAX_QUERY_LENGTH
from .sql_worker import READY


_WORKER = Path(__file__).with_name("sql_worker.py")
_GRACE = 2.0  # seconds: a query that SQLite interrupts in time must be able to say so


@dataclass(frozen=True)
class QueryLimits:
    """
    How much a query may take.

    Attributes:
        seconds (`float`): time of a query.
        max_rows (`int`): rows of a result.
        max_bytes (`int`): bytes of a result, in Python's memory. It takes little more while it is read.
        max_value_bytes (`int`): bytes of a text or blob, also of one inside the query (Python 3.11 and newer; with
            3.10 only `max_memory` bounds it).
        max_memory (`int`): bytes that SQLite may take while it works.

    Raises:
        ValueError: if one of them is not positive.
    """

    seconds: float = 10.0
    max_rows: int = 100_000
    max_bytes: int = 64 * 2**20
    max_value_bytes: int = 2**20
    max_memory: int = 256 * 2**20

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value > 0:
                raise ValueError(f"`{name}` must be positive, got {value!r}.")


@dataclass(frozen=True)
class QueryResult:
    """
    What came of a query.

    Attributes:
        kind (`str`): `"rows"`; or why there are none: `"no database"` (there is no such file, or it is no database),
            `"database in use"` (a log beside it holds changes), `"no query"`, `"several statements"`, `"syntax
            error"`, `"unknown name"` (of a table, a column or a function), `"forbidden"` (it would do more than read),
            `"time"`, `"too many rows"`, `"too large"` (also a query of over 100,000 characters), or `"error"` (all
            else).
        columns (`list[str]`): names of the columns, in order.
        rows (`list[tuple]`): `None`, `int`, `float`, `str` and `bytes`, in order. Bytes of texts that are not UTF-8
            are left out.
        message (`str`): what SQLite says, where there are no rows.
    """

    kind: str
    columns: list[str] = field(default_factory=list)
    rows: list[tuple[Any, ...]] = field(default_factory=list)
    message: str = ""


class QueryRunner:
    """
    Runs queries one after another in a process of its own; a context manager, which ends the process.

    The process is started by the first query, and again after one that had to be ended with it.

    Args:
        limits (`QueryLimits`, *optional*): of each query.

    Example:

    ```python
    with QueryRunner(QueryLimits(seconds=1)) as runner:
        runner.run(Path("concert_singer.sqlite"), "SELECT count(*) FROM singer").rows  # [(6,)]
    ```
    """

    def __init__(self, limits: QueryLimits | None = None):
        self.limits = limits or QueryLimits()
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> QueryRunner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, database: str | Path, query: str) -> QueryResult:
        """
        Run one query.

        Args:
            database (`str` or `Path`): an SQLite file. Neither it nor its folder changes.
            query (`str`): SQL; one statement, with or without a semicolon and comments.

        Returns:
            `QueryResult`.

        Raises:
            RuntimeError: if Python cannot start the process.
        """
        if len(query) > MAX_QUERY_LENGTH:
            return QueryResult("too large", message=f"the query has more than {MAX_QUERY_LENGTH:,} characters")
        request = json.dumps({"database": str(database), "query": query})
        with self._lock:
            try:
                return self._ask(request)
            except BaseException:
                # An answer that nobody has read would be taken for that of the next query.
                self._end()
                raise

    def close(self) -> None:
        """End the process. A further query starts another one."""
        with self._lock:
            self._end()

    def _ask(self, request: str) -> QueryResult:
        """Send a request and read its answer; the process is ended if that takes too long."""
        process = self._started()
        late = threading.Event()

        def end_late() -> None:
            late.set()
            process.kill()

        assert process.stdin is not None and process.stdout is not None
        timer = threading.Timer(self.limits.seconds + _GRACE, end_late)
        timer.daemon = True
        timer.start()
        try:
            process.stdin.write(request + "\n")
            process.stdin.flush()
            result = _read_result(process.stdout)
        except OSError:  # it is gone, and so is the pipe
            result = None
        finally:
            timer.cancel()
            timer.join()
        if late.is_set() or result is None:
            self._end()
        if result is not None:
            return result
        if late.is_set():
            return QueryResult("time", message=f"ended after {self.limits.seconds} s, in a call that does not stop")
        return QueryResult("error", message="the process that ran the query has ended")

    def _started(self) -> subprocess.Popen[str]:
        if self._process is not None and self._process.poll() is not None:
            self._end()  # it has ended between two queries, which is no fault of the next one
        if self._process is None:
            self._process = subprocess.Popen(
                # Isolated, without site packages: it starts at once, and what is installed cannot change it.
                [sys.executable, "-I", "-S", str(_WORKER), json.dumps(asdict(self.limits))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                encoding="ascii",
            )
            assert self._process.stdout is not None
            if self._process.stdout.readline() != READY:  # its time counts from here
                raise RuntimeError(f"The process for queries, {_WORKER} run by {sys.executable!r}, does not start.")
        return self._process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            try:
                stream.close()
            except OSError:  # what was not sent any more
                pass


def run_query(database: str | Path, query: str, limits: QueryLimits | None = None) -> QueryResult:
    """
    Run one query in a process that is started for it; `QueryRunner` keeps one for many queries.

    Args:
        database (`str` or `Path`): an SQLite file. Neither it nor its folder changes.
        query (`str`): SQL; one statement.
        limits (`QueryLimits`, *optional*): how much it may take.

    Returns:
        `QueryResult`.
    """
    with QueryRunner(limits) as runner:
        return runner.run(database, query)


def _read_result(stream: IO[str]) -> QueryResult | None:
    """What the lines of an answer say, part by part; `None` if they end before it does."""
    rows: list[tuple[Any, ...]] = []
    while (line := stream.readline()).endswith("\n"):
        part = json.loads(line)
        rows.extend(tuple(map(_read_value, row)) for row in part.get("rows", []))
        if "kind" in part:
            is_whole = part["kind"] == "rows"
            return QueryResult(
                part["kind"], part.get("columns", []), rows if is_whole else [], part.get("message", "")
            )
    return None


def _read_value(value: Any) -> Any:
    return bytes.fromhex(value["hex"]) if isinstance(value, dict) else value
