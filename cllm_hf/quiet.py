"""The hosts' notices and progress bars, where a command has its own, and the notices of this package."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging


@contextmanager
def quiet_hosts(keep_bars: bool = False) -> Iterator[None]:
    """
    Do without the hosts' notices about calls that are made on purpose, and without their progress bars.

    Args:
        keep_bars (`bool`): whether to leave the bars of loading and downloading a model, which takes long for a large
            one.
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
    """
    Write the warnings that this package logs to stderr, above a progress bar if there is one.

    Args:
        show (`bool`): whether to, which one of several processes should.
    """
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
