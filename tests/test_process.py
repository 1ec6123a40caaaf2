"""Which process this one is, and the hosts' notices and bars: off within the context, and as they were after it."""

import datasets
import pytest
from transformers.utils import logging

from cllm_hf.process import Process, quiet_hosts


@pytest.fixture
def states():
    def read():
        return logging.get_verbosity(), logging.is_progress_bar_enabled(), not datasets.are_progress_bars_disabled()

    before = read()
    yield read
    assert read() == before


@pytest.mark.parametrize("keep_bars", [False, True])
def test_quiet_and_as_before(states, keep_bars):
    before = states()
    with pytest.raises(KeyboardInterrupt), quiet_hosts(keep_bars):
        assert states() == (logging.ERROR, keep_bars and before[1], False)
        raise KeyboardInterrupt
    assert states() == before


def test_bars_that_were_off_stay_off(states):
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    try:
        with quiet_hosts():
            pass
        assert states()[1:] == (False, False)
    finally:
        datasets.enable_progress_bars()
        logging.enable_progress_bar()


def test_launchers_say_which_process_this_is(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert Process.current() == Process(0, 1, 0) and Process.current().is_first
    monkeypatch.setenv("RANK", "9")
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert Process.current() == Process(9, 16, 1) and not Process.current().is_first
    monkeypatch.setenv("LOCAL_RANK", "-1")
    assert Process.current().local_index == 0
    monkeypatch.setenv("LOCAL_RANK", "one")
    with pytest.raises(ValueError, match="`LOCAL_RANK` must be a number, got 'one'"):
        Process.current()
