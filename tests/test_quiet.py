"""The hosts' notices and bars are off within the context, and as they were after it."""

import datasets
import pytest
from transformers.utils import logging

from cllm_hf.quiet import quiet_hosts


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
