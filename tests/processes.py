"""Processes that tests start."""

import multiprocessing
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch


# What a script or module is run with by two processes that know each other, on a port of their own.
TWO_PROCESSES = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
# A shell has what it starts in the background ignore Ctrl-C, and processes pass that on to those they start.
_CODE = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from cllm_hf.cli import main
sys.exit(main())
"""


@contextmanager
def cllm_process(arguments: list[str], **options: Any) -> Iterator[subprocess.Popen]:
    """`cllm` with arguments in a process that Ctrl-C interrupts; it ends with the block, whatever happens in that."""
    process = subprocess.Popen([sys.executable, "-c", _CODE, *arguments], stderr=subprocess.PIPE, text=True, **options)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def in_new_process(function: Callable[..., Any], *args: Any) -> Any:
    """
    Call a function of a module in a process that is started anew, and raise what it raises.

    Such a process may fork: one that has run other tests has threads, and a fork of it may wait for ever for a lock
    that one of them held.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, torch.set_num_threads, (1,)) as pool:
        return pool.submit(function, *args).result()
