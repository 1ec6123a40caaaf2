"""What the fuzzers share: how many cases they try, and how they draw them."""

import os

from hypothesis import HealthCheck, settings


def fuzz(num_cases):
    """Settings of `hypothesis` for this many cases, or as many as the environment variable `FUZZ_CASES` says."""
    return settings(
        max_examples=int(os.environ.get("FUZZ_CASES", num_cases)),
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        database=None,
    )
