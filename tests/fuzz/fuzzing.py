"""What the fuzzers share: how many cases there are, and how a case that hangs becomes a failure."""

import os
import signal
import threading
import time
from contextlib import contextmanager

from hypothesis import HealthCheck, settings


SEED = int(os.environ.get("FUZZ_SEED", "0"))
# Seconds after which a case counts as hanging: many times what the slowest one takes.
PATIENCE = 60


def num_cases(default):
    """`FUZZ_CASES` of the environment, or so many."""
    return int(os.environ.get("FUZZ_CASES", default))


def fuzz(default):
    """Settings of `hypothesis` for this many cases, or as many as the environment variable `FUZZ_CASES` says."""
    return settings(
        max_examples=num_cases(default),
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        database=None,
    )


class Hang(BaseException):
    """A case does not come to an end; no `except Exception` takes it for a fault of the case."""


@contextmanager
def patience(case):
    """Raise `Hang` in the midst of a case that takes too long, where the system can."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def give_up(*_):
        raise Hang(f"{case!r:.2000}")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_cases(cases, judge):
    """Judge all cases. Returns the kinds of judgements; prints what they took, which `pytest -s` shows."""
    kinds, slowest, start = {}, (0.0, None), time.perf_counter()
    for case in cases:
        begin = time.perf_counter()
        try:
            with patience(case):
                kind = judge(case)
        except Exception as error:
            raise AssertionError(f"{type(error).__name__} from {case!r:.5000}") from error
        slowest = max(slowest, (time.perf_counter() - begin, repr(case)[:300]))
        kinds[kind] = kinds.get(kind, 0) + 1
    print(f"{sum(kinds.values())} cases in {time.perf_counter() - start:.0f} s, the slowest {slowest}; {kinds}")
    return kinds
