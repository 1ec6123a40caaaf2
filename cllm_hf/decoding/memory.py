"""
What a model remembers of the tokens it has been fed, and how it forgets the rejected ones among them.

There are three ways, and `choose_memory` picks one for a model and its cache:

- `CroppedMemory`: a key/value cache, from which rejected tokens are cut out.
- `ReplayedMemory`: a recurrent state, which is put back when a token was rejected; the tokens since then are fed again
  together with the next draft.
- `NoMemory`: nothing; every forward pass is over the whole sequence.

`StaticMemory` (`static.py`) is the first of them in tensors of fixed shape, for a compiled model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import BaseQuantizedLayer, Cache, DynamicLayer, LinearAttentionCacheLayerMixin

from ..blocks.limits import forgets_between_steps
from .caches import (
    copy_cache,
    decoder_cache,
    drop_leading_columns,
    keep_places,
    keeps_places,
    restore_start,
    restore_states,
    rolls_back_rows,
    save_start,
    save_states,
    select_rows,
    stop_recording,
)


# The host gives the caches of some models another name.
CACHE_NAMES = ("past_key_values", "cache_params")


class Memory(ABC):
    """What the loop asks of a memory."""

    cache: Cache | None = None
    same_length = False
    drafts_in_prefill = True
    replays = False
    fixed_shape = False

    @property
    def num_cached(self) -> int:
        """`int`: tokens that need not be fed again."""
        return 0

    @property
    @abstractmethod
    def model_inputs(self) -> dict[str, Any]:
        """`dict`: arguments of the forward pass."""

    def begin(self, draft_length: int) -> None:
        """Prepare for a forward pass that ends in a draft of this length."""

    def call(self, model: Any, **inputs: Any) -> Any:
        """Run the model."""
        return model(**inputs)

    @property
    def keeps_places(self) -> bool:
        """`bool`: whether `settle` can keep other places than the first ones, as trees need it."""
        return False

    @property
    def hides_places(self) -> bool:
        """`bool`: whether a mask can say which of the last places see which, while the first ones are kept."""
        return self.keeps_places

    @abstractmethod
    def settle(self, paths: list[list[int]], num_fed: int) -> bool:
        """Forget the rejected tokens of the last forward pass."""

    def after_prefill(self) -> Memory:
        """The memory to go on with, now that the model has shown what its cache holds."""
        return self

    def select(self, indices: torch.Tensor) -> None:
        """Keep these rows (`torch.LongTensor` of shape `(num_rows,)`) only."""

    def drop_leading(self, count: int) -> None:
        """Forget this many first columns, which are padding in all rows."""

    def close(self) -> None:
        """Leave the cache fit for other uses."""

    def abandon(self) -> None:
        """Take back what was done to a cache of the user. Must not raise: another exception is on its way."""


class NoMemory(Memory):
    """Nothing is remembered: every forward pass is over the whole sequence."""

    @property
    def model_inputs(self) -> dict[str, Any]:
        return {"use_cache": False}

    def settle(self, paths: list[list[int]], num_fed: int) -> bool:
        return False


class CroppedMemory(Memory):
    """A key/value cache, from which rejected tokens are cut out."""

    def __init__(self, cache: Cache, batch_size: int, is_user_cache: bool = False):
        self.cache: Cache = cache
        self._is_recording = False
        self._start = save_start(cache) if is_user_cache else None
        self.same_length = batch_size > 1 and not rolls_back_rows(cache)

    @property
    def num_cached(self) -> int:
        return self.cache.get_seq_length()

    @property
    def model_inputs(self) -> dict[str, Any]:
        return {"past_key_values": self.cache, "use_cache": True}

    def begin(self, draft_length: int) -> None:
        if not self._is_recording:
            self.cache.activate_past_recording()
            self._is_recording = True

    @property
    def keeps_places(self) -> bool:
        return keeps_places(self.cache)

    def settle(self, paths: list[list[int]], num_fed: int) -> bool:
        keep_places(self.cache, paths, num_fed)
        return True

    def after_prefill(self) -> Memory:
        if self.cache.get_seq_length() == 0:  # the model takes no cache, and the host gives it one nevertheless
            return NoMemory()
        if not self.cache.is_croppable:
            raise ValueError(
                '`decoding="jacobi"` takes back rejected tokens, which the cache of this model does not allow. Pass '
                '`decoding="autoregressive"` for it.'
            )
        return self

    def select(self, indices: torch.Tensor) -> None:
        select_rows(self.cache, indices)

    def drop_leading(self, count: int) -> None:
        drop_leading_columns(self.cache, count)

    def close(self) -> None:
        stop_recording(self.cache)

    def abandon(self) -> None:
        if self._start is not None:
            restore_start(self.cache, self._start)


class ReplayedMemory(Memory):
    """A recurrent state, which is put back when a token was rejected."""

    # A draft after the prompt would have the whole prompt fed again.
    drafts_in_prefill = False
    replays = True

    def __init__(self, name: str, cache: Cache, batch_size: int):
        self.cache: Cache = cache
        self.same_length = batch_size > 1
        self._name = name
        self._batch_size = batch_size
        self._saved: list[dict[str, Any]] | None = None

    @property
    def num_cached(self) -> int:
        # Recurrent states do not say how many tokens they hold.
        has_attention = any(isinstance(layer, DynamicLayer) for layer in self.cache.layers)
        return self.cache.get_seq_length() if has_attention else 0

    @property
    def model_inputs(self) -> dict[str, Any]:
        return {self._name: self.cache, "use_cache": True}

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

    def select(self, indices: torch.Tensor) -> None:
        select_rows(self.cache, indices)


def choose_memory(model: Any, model_kwargs: dict[str, Any], batch_size: int, is_user_cache: bool) -> Memory:
    """Choose how a model's rejected tokens are forgotten."""
    found = [(name, model_kwargs.pop(name, None)) for name in CACHE_NAMES]
    name, cache = next(((name, cache) for name, cache in found if cache is not None), ("", None))
    use_cache = model_kwargs.pop("use_cache", True)
    if not use_cache or cache is None or forgets_between_steps(model):
        if is_user_cache:
            raise ValueError(
                f'`decoding="jacobi"` feeds the whole sequence to {type(model).__name__} in every forward pass, got '
                '`past_key_values`. Drop them and pass the whole prompt, or pass `decoding="autoregressive"`.'
            )
        return NoMemory()
    own = decoder_cache(cache)
    if not isinstance(own, DynamicCache) or any(isinstance(layer, BaseQuantizedLayer) for layer in own.layers):
        raise ValueError(
            f'`decoding="jacobi"` needs a dynamic key/value cache, got {type(own).__name__}. Drop '
            '`cache_implementation` and static or quantized caches, or pass `decoding="autoregressive"`.'
        )
    if is_user_cache and (cache is not own or own.offloading):
        raise ValueError(
            '`decoding="jacobi"` does not go on from the `past_key_values` of an encoder-decoder model, nor from '
            'offloaded ones, got such. Drop them, or pass `decoding="autoregressive"`.'
        )
    if any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in own.layers):
        if is_user_cache:
            raise ValueError(
                '`decoding="jacobi"` leaves recurrent and convolutional states after the end of the text, got such '
                "`past_key_values`, to be extended. Drop them and pass the whole prompt, or pass "
                '`decoding="autoregressive"`.'
            )
        return ReplayedMemory(name, cache, batch_size)
    if is_user_cache and batch_size > 1:
        cache = copy_cache(cache)
    return CroppedMemory(cache, batch_size, is_user_cache and batch_size == 1)
