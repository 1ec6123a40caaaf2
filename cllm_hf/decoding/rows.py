"""The whole state of a row of the batch, and what came of it in a forward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Pending:
    """Tokens to feed, with what the model wants to know of each."""

    ids: list[int]  # token ids; 0 where a column is padding
    positions: list[int] | None = None  # position of each, for models that take positions
    token_types: list[int] | None = None  # type of each, for models that take types

    def map(self, change: Callable[[list[int]], list[int]]) -> Pending:
        """Change all three alike."""
        return Pending(
            change(self.ids),
            None if self.positions is None else change(self.positions),
            None if self.token_types is None else change(self.token_types),
        )

    def then(self, ids: list[int], offsets: list[int], last_position: int) -> Pending:
        """Add tokens."""
        positions, types = self.positions, self.token_types
        if positions is not None:
            last = positions[-1]
            positions = positions + [min(last + offset, last_position) for offset in offsets]
        return Pending(self.ids + ids, positions, None if types is None else types + types[-1:] * len(ids))


@dataclass(frozen=True)
class Verdict:
    """What came of a row in a forward pass."""

    token_ids: list[int]  # tokens that were committed, at least one; with padding after the end of its text
    num_own: int  # how many of them are not such padding
    path: list[int]  # as many places: the anchor and the accepted tokens
    predictions: list[int]  # the model's next token after each place that was fed
    is_stopped: bool  # whether the text has ended


@dataclass
class Row:
    """
    A row of the batch.

    Attributes:
        index (`int`): its place in the batch that was passed to `generate`.
        text (`list[int]`): the prompt without padding, then what was committed; the anchor last.
        context (`list[int]`): tokens to draw a first guess from: the prompt, or what an encoder has read; empty for a
            prompt of embeddings.
        length (`int`): columns of prompt and committed tokens in the sequences that `generate` returns.
        pending (`Pending`): committed tokens that the model does not remember; the anchor last.
        num_padding (`int`): its first columns that are padding, without those that all rows begin with.
        gains (`list[int]`): tokens of each forward pass that it took part in.
        is_stopped (`bool`): whether its text has ended. It may stay in the batch, and takes padding then.
        notes (`Any`): what the strategy keeps of it.
    """

    index: int
    text: list[int]
    context: list[int]
    length: int
    pending: Pending
    num_padding: int = 0
    gains: list[int] = field(default_factory=list)
    is_stopped: bool = False
    notes: Any = None

    @property
    def anchor(self) -> int:
        """`int`: the last committed token, which is fed first. Of a prompt of embeddings it says nothing."""
        return self.pending.ids[-1]

    def commit(self, verdict: Verdict) -> None:
        """Take what came of a forward pass."""
        self.text += verdict.token_ids
        self.length += len(verdict.token_ids)
        if verdict.num_own:
            self.gains.append(verdict.num_own)
        self.is_stopped = verdict.is_stopped
