"""This process: which of several that share a work it is, and what it lets libraries write to its terminal."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging


@dataclass(frozen=True)
class Process:
    """Which of several processes this one is."""

    index: int = 0
    count: int = 1
    local_index: int = 0  # among those on this machine; its GPU has that number

    @classmethod
    def current(cls) -> Process:
        """
        This process, by what `torchrun` and `accelerate launch` say of it: `RANK`, `WORLD_SIZE` and `LOCAL_RANK`. A
        `ValueError` if they are not numbers that fit each other.
        """
        index, count = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
            raise ValueError(
                "The environment variables `RANK` and `WORLD_SIZE` must be numbers, `RANK` below `WORLD_SIZE`, got "
                f"{index!r} and {count!r}. Unset both to run in one process."
            )
        local_index = os.environ.get("LOCAL_RANK", "0")
        if not local_index.removeprefix("-").isdecimal():
            raise ValueError(
                f"The environment variable `LOCAL_RANK` must be a number, got {local_index!r}. Unset it to use the "
                "first GPU."
            )
        return cls(int(index), int(count), max(int(local_index), 0))  # some launchers say -1 for a single process

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes and talks."""
        return self.index == 0


@contextmanager
def quiet_hosts(keep_bars: bool = False) -> Iterator[None]:
    """
    Do without the hosts' notices about calls that are made on purpose, and without their progress bars; `keep_bars`
    leaves those of loading and downloading a model, which takes long for a large one.
    """
    verbosity = transformers_logging.get_verbosity()
    had_bars = transformers_logging.is_progress_bar_enabled() and not keep_bars
    had_data_bars = not are_progress_bars_disabled()
    transformers_logging.set_verbosity_error()
    disable_progress_bars()
    if had_bars:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if had_bars:
            transformers_logging.enable_progress_bar()
        if had_data_bars:
            enable_progress_bars()
        transformers_logging.set_verbosity(verbosity)


@contextmanager
def show_notices(show: bool = True) -> Iterator[None]:
    """Write the warnings that this package logs to stderr, above a progress bar; one of several processes should."""
    handler = _Notices(logging.WARNING)
    if not show:
        handler.addFilter(lambda record: False)
    logger = logging.getLogger(__package__)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class _Notices(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(f"cllm: {self.format(record)}", file=sys.stderr)
