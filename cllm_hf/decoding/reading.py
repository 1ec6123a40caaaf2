"""
The model's last hidden states, for strategies that draft from them: what `read` of a strategy is given.

A forward hook on the decoder keeps them, only while the model runs for such a strategy. Where a forward pass is
compiled the hook becomes a part of the graph, which is one of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import CompileConfig

from .memory import Memory
from .strategy import Row, Strategy, Verdict, is_reading


_ATTRIBUTE = "_cllm_hf_reader"  # of a model, since a compiled graph belongs to its reader


class Reader:
    """Runs a model, and keeps the last hidden states until `take` is asked for those of each row."""

    def __init__(self, model: Any):
        self._model, self._decoder = model, model.get_decoder()
        if self._decoder is model:
            raise ValueError(
                f"A strategy with `read` needs a model with a decoder below its head, got {type(model).__name__}, "
                "which transformers knows none of. Choose another value of `decoding`."
            )
        self._states: torch.Tensor | None = None
        self._compiled: tuple[CompileConfig, Callable[..., Any]] | None = None

    def __reduce__(self) -> Any:
        return type(None), ()  # a copy of the model makes its own

    def call(self, memory: Memory, **inputs: Any) -> Any:
        """Run the model over a forward pass, by its memory."""
        handle = self._decoder.register_forward_hook(self._keep)
        try:
            output = memory.call(self._model, **inputs)
        except BaseException:
            self._states = None
            raise
        finally:
            handle.remove()
        assert self._states is not None  # the decoder has run
        states = memory.rows_of(self._states)
        self._states = states.clone() if memory.fixed_shape else states  # the next run of a graph writes over them
        return output

    def compiled(self, config: CompileConfig) -> Callable[..., Any]:
        """The model as one compiled graph that keeps hidden states."""
        if self._compiled is None or self._compiled[0] != config:
            self._compiled = config, torch.compile(self._run, **config.to_dict())
        run = self._compiled[1]

        def call(**inputs: Any) -> Any:
            output, self._states = run(**inputs)
            return output

        return call

    def take(self, rows: Sequence[Row], verdicts: Sequence[Verdict], num_fed: int) -> list[torch.Tensor]:
        """Hidden states of the committed text of each row that was fed, `[num_tokens, hidden_size]`."""
        states, self._states = self._states, None
        assert states is not None  # the forward pass has ended
        anchor = states.shape[1] - num_fed
        return [
            _of_row(own, anchor, len(row.text) - len(verdict.token_ids), row, verdict.path)
            for own, row, verdict in zip(states, rows, verdicts)
        ]

    def _run(self, **inputs: Any) -> Any:
        output = self._model(**inputs)
        return output, self._states

    def _keep(self, module: Any, arguments: Any, output: Any) -> None:
        self._states = output[0]  # [num_rows, num_columns, hidden_size]


def _of_row(states: torch.Tensor, anchor: int, num_read: int, row: Row, path: list[int]) -> torch.Tensor:
    # Before its text a row has padding, and a prompt of embeddings has no text.
    num_pending = max(min(len(row.pending.ids), num_read), 1)
    first = anchor + 1 - num_pending
    if path[-1] < len(path):  # the first places
        return states[first : anchor + len(path)]
    return torch.cat([states[first:anchor], states[anchor + torch.tensor(path, device=states.device)]])


def make_reader(strategy: Strategy, model: Any) -> Reader | None:
    """What a strategy reads by, if it reads: that of the model."""
    if not is_reading(strategy):
        return None
    reader = vars(model).get(_ATTRIBUTE) or Reader(model)
    vars(model)[_ATTRIBUTE] = reader
    return reader
