"""
The model's last hidden states, for strategies that draft from them: what `read` of a strategy is given.

A forward hook on the decoder keeps them, from before the loop until it ends, whatever ends it. Where a strategy does
not read, there is no hook.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from .strategy import Row, Strategy, Verdict, is_reading


class Reader:
    """Keeps the last hidden states of a forward pass until `take` is asked for those of each row."""

    def __init__(self, model: Any):
        self._decoder = model.get_decoder()
        if self._decoder is model:
            raise ValueError(
                f"A strategy with `read` needs a model with a decoder below its head, got {type(model).__name__}, "
                "which transformers knows none of. Choose another value of `decoding`."
            )
        self._states: torch.Tensor | None = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Keep hidden states until the block ends."""
        handle = self._decoder.register_forward_hook(self._keep)
        try:
            yield
        finally:
            handle.remove()
            self._states = None

    def take(self, rows: Sequence[Row], verdicts: Sequence[Verdict], num_fed: int) -> list[torch.Tensor]:
        """Hidden states of the committed text of each row that was fed, `[num_tokens, hidden_size]`, anchor and on."""
        states, self._states = self._states, None
        assert states is not None  # the forward pass has ended
        anchor = states.shape[1] - num_fed
        return [
            _of_row(own, anchor, len(row.text) - len(verdict.token_ids), row, verdict.path)
            for own, row, verdict in zip(states, rows, verdicts)
        ]

    def _keep(self, module: Any, arguments: Any, output: Any) -> None:
        self._states = output[0]  # [num_rows, num_columns, hidden_size]


def _of_row(states: torch.Tensor, anchor: int, num_read: int, row: Row, path: list[int]) -> torch.Tensor:
    # Before its text a row has padding, and a prompt of embeddings has no text.
    num_pending = max(min(len(row.pending.ids), num_read), 1)
    first = anchor + 1 - num_pending
    if path[-1] < len(path):  # the first places
        return states[first : anchor + len(path)]
    return torch.cat([states[first:anchor], states[anchor + torch.tensor(path, device=states.device)]])


def make_reader(strategy: Strategy, model: Any, is_compiled: bool) -> Reader | None:
    """What a strategy reads by, if it reads."""
    if not is_reading(strategy):
        return None
    if is_compiled:
        raise ValueError(
            f"Compiled iterations keep no hidden states, got `jacobi_compile=True` or a static cache with "
            f"{type(strategy).__name__}, which reads them. Drop that."
        )
    return Reader(model)
