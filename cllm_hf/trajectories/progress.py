"""How far a collection is."""

from __future__ import annotations

import time

from tqdm.auto import tqdm


class Progress:
    """
    A bar of prompts, with the rate of response tokens and the number of dropped prompts.

    Args:
        total (`int`): prompts of the collection, of this process.
        done (`int`): of them, what an earlier run has done.
        show (`bool`): whether to draw it.
    """

    def __init__(self, total: int, done: int = 0, show: bool = True):
        # Without the rate of prompts, which jumps from batch to batch.
        layout = "{desc}: {percentage:3.0f}% {bar} {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
        self._bar = tqdm(total=total, initial=done, desc="Collecting", bar_format=layout, disable=not show)
        self._start = time.perf_counter()
        self._num_tokens = self._num_dropped = 0
        self._doing = ""

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self._doing = "done" if self._bar.n >= self._bar.total else "stopped"
        self._draw()
        self._bar.close()

    def say(self, doing: str) -> None:
        """
        Say what is being computed.

        Args:
            doing (`str`): a few words.
        """
        self._doing = doing
        self._draw()

    def advance(self, num_tokens: int = 0, dropped: bool = False) -> None:
        """
        Count a prompt as done.

        Args:
            num_tokens (`int`): tokens of its response.
            dropped (`bool`): whether it gave no record.
        """
        self._num_tokens += num_tokens
        self._num_dropped += dropped
        self._draw(refresh=False)
        self._bar.update()

    def _draw(self, refresh: bool = True) -> None:
        rate = self._num_tokens / max(time.perf_counter() - self._start, 1e-9)
        self._bar.set_postfix_str(f"{rate:,.0f} tokens/s, {self._num_dropped} dropped, {self._doing}", refresh)
