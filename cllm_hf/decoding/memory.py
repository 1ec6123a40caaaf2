"""
What a model remembers of the tokens it has been fed, and how it forgets the rejected ones among them.

- `Memory` itself: nothing is remembered; every forward pass is over the whole sequence.
- `CroppedMemory`: a key/value cache, from which rejected tokens are cut out.
- `ReplayedMemory`: a recurrent state, which is put back when a token was rejected; the tokens since then are fed again
  together with the next draft.

`memory_choice` picks one of them for a model and its cache, or the `StaticMemory` of a compiled model.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from transformers.cache_utils import Cache, DynamicLayer

from .._host import CACHE_NAME
from .caches import (
    drop_leading_columns,
    keep_places,
    keeps_places,
    restore_start,
    restore_states,
    rolls_back_rows,
    save_start,
    save_states,
    stop_recording,
)


class Memory:
    """What the loop asks of a memory; this one has no cache, and remembers nothing."""

    cache: Cache | None = None  # handed to the model
    cache_name = CACHE_NAME  # the model's name for it
    same_length = False  # whether all rows must commit equally many tokens
    drafts_in_prefill = True  # whether a draft may follow the prompt in the first forward pass
    fixed_shape = False  # whether all forward passes after the prefill must be over equally many tokens
    # Whether a rejected token has others fed again, so that now and then a forward pass without a draft is worth its
    # while, after which all are remembered.
    replays = False

    @property
    def num_cached(self) -> int:
        """Tokens that need not be fed again."""
        return 0 if self.cache is None else self.cache.get_seq_length()

    @property
    def model_inputs(self) -> dict[str, Any]:
        """Arguments of the forward pass."""
        return {"use_cache": False} if self.cache is None else {self.cache_name: self.cache, "use_cache": True}

    @property
    def keeps_places(self) -> bool:
        """Whether `settle` can keep other places than the first ones, as trees need it."""
        return False

    @property
    def hides_places(self) -> bool:
        """Whether a mask can say which of the last places see which, while the first ones are kept."""
        return self.keeps_places

    def begin(self, draft_length: int) -> None:
        """Prepare for a forward pass that ends in a draft of this length."""

    def call(self, model: Any, **inputs: Any) -> Any:
        """Run the model."""
        return model(**inputs)

    def rows_of(self, values: torch.Tensor) -> torch.Tensor:
        """Of what a forward pass gives for each place of the batch, that of the rows which are still there."""
        return values

    def settle(self, paths: list[list[int]], num_fed: int) -> bool:
        """
        Forget the rejected ones of the last `num_fed` tokens, the anchor and the draft or tree: all whose places are
        not in a row's path. Says whether the others are remembered, so that they need not be fed again.
        """
        return False

    def after_prefill(self) -> Memory:
        """The memory to go on with, now that the model has shown what its cache holds."""
        return self

    def select(self, indices: torch.Tensor) -> None:
        """Keep these rows only."""
        if self.cache is not None:
            # Recurrent layers have no method to select rows, but one to reorder them, for beams.
            self.cache.reorder_cache(cast(torch.LongTensor, indices))

    def drop_leading(self, count: int) -> None:
        """Forget this many first columns, which are padding in all rows."""

    def close(self) -> None:
        """Leave the cache fit for other uses."""

    def result(self) -> Cache | None:
        """A cache that the caller can go on with."""
        return self.cache

    def abandon(self) -> None:
        """Take back what was done to a cache of the user. Must not raise: another exception is on its way."""


class CroppedMemory(Memory):
    """A key/value cache; one that the user holds too is put back as it was if the call fails."""

    def __init__(self, cache: Cache, batch_size: int, is_user_cache: bool = False):
        self.cache: Cache = cache
        self._is_recording = False
        self._start = save_start(cache) if is_user_cache else None
        self.same_length = batch_size > 1 and not rolls_back_rows(cache)

    @property
    def keeps_places(self) -> bool:
        return keeps_places(self.cache)

    def begin(self, draft_length: int) -> None:
        if not self._is_recording:
            self.cache.activate_past_recording()
            self._is_recording = True

    def settle(self, paths: list[list[int]], num_fed: int) -> bool:
        keep_places(self.cache, paths, num_fed)
        return True

    def after_prefill(self) -> Memory:
        if self.cache.get_seq_length() == 0:  # the model takes no cache, and transformers gives it one nevertheless
            return Memory()
        if not self.cache.is_croppable:
            raise ValueError(
                '`decoding="jacobi"` takes back rejected tokens, which the cache of this model does not allow. Pass '
                '`decoding="autoregressive"` for it.'
            )
        return self

    def drop_leading(self, count: int) -> None:
        drop_leading_columns(self.cache, count)

    def close(self) -> None:
        stop_recording(self.cache)

    def abandon(self) -> None:
        if self._start is not None:
            restore_start(self.cache, self._start)


class ReplayedMemory(Memory):
    """A recurrent state, in a cache that the model calls by a name of its own."""

    # A draft after the prompt would have the whole prompt fed again.
    drafts_in_prefill = False
    replays = True

    def __init__(self, name: str, cache: Cache, batch_size: int):
        self.cache: Cache = cache
        self.same_length = batch_size > 1
        self.cache_name, self._batch_size = name, batch_size
        self._saved: list[dict[str, Any]] | None = None

    @property
    def num_cached(self) -> int:
        # Recurrent states do not say how many tokens they hold.
        has_attention = any(isinstance(layer, DynamicLayer) for layer in self.cache.layers)
        return self.cache.get_seq_length() if has_attention else 0

    def begin(self, draft_length: int) -> None:
        self._saved = save_states(self.cache) if draft_length else None

    def settle(self, paths: list[list[int]], num_fed: int) -> bool:
        if all(len(path) == num_fed for path in paths):
            return True
        assert self._saved is not None  # nothing can be rejected where nothing was drafted
        restore_states(self.cache, self._saved)
        return False

    def after_prefill(self) -> Memory:
        # Convolutional states alone, as in LFM2, can be cropped; layers know only now that they hold nothing else.
        if not self.cache.is_croppable:
            return self
        cropped = CroppedMemory(self.cache, self._batch_size)
        cropped.begin(0)
        return cropped
