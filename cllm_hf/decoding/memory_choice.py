"""Which memory a model decodes with; see `memory` and `compiled`."""

from __future__ import annotations

from typing import Any

from transformers import DynamicCache
from transformers.cache_utils import BaseQuantizedLayer, LinearAttentionCacheLayerMixin

from .._host import CACHE_NAMES
from ..blocks.limits import limits_of
from .caches import copy_cache, decoder_cache
from .compiled import Compiling, make_static
from .memory import CroppedMemory, Memory, ReplayedMemory


def choose_memory(
    model: Any,
    model_kwargs: dict[str, Any],
    batch_size: int,
    is_user_cache: bool,
    compiling: Compiling | None,
    max_columns: int,
    num_drafting: int,
) -> Memory:
    """
    Choose how a model's rejected tokens are forgotten; the cache and `use_cache` are taken out of `model_kwargs`.

    A batch works on a copy of a cache of the user, since its rows leave the cache as they finish. With `compiling` the
    cache is static where the model allows it: `max_columns` is the most that it will hold, without `num_drafting` of a
    drafter, at positions that others have too.
    """
    if compiling is not None:
        static = make_static(model, batch_size, is_user_cache, compiling, max_columns, num_drafting)
        if static is not None:
            _take_cache(model_kwargs)  # ours replaces it
            return static
    name, cache, use_cache = _take_cache(model_kwargs)
    if not use_cache or cache is None or limits_of(model).no_later_steps:
        if is_user_cache:
            raise ValueError(
                f'`decoding="jacobi"` feeds the whole sequence to {type(model).__name__} in every forward pass, got '
                '`past_key_values`. Drop them and pass the whole prompt, or pass `decoding="autoregressive"`.'
            )
        return Memory()
    own = decoder_cache(cache)
    if not isinstance(own, DynamicCache) or any(isinstance(layer, BaseQuantizedLayer) for layer in own.layers):
        raise ValueError(
            f'`decoding="jacobi"` needs a dynamic key/value cache, got {type(own).__name__}. Drop '
            '`cache_implementation` and static or quantized caches, or pass `decoding="autoregressive"`.'
        )
    foreign = [type(part) for part in (own, *own.layers) if not type(part).__module__.startswith("transformers.")]
    if is_user_cache and foreign:
        raise ValueError(
            '`decoding="jacobi"` takes rejected tokens out of `past_key_values`, which must be of classes of '
            f'transformers, got {foreign[0].__name__}. Pass a `DynamicCache`, or pass `decoding="autoregressive"`.'
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


def _take_cache(model_kwargs: dict[str, Any]) -> tuple[str, Any, bool]:
    """Take the cache out of model inputs: its name, the cache, and whether it is to be used."""
    found = [(name, model_kwargs.pop(name, None)) for name in CACHE_NAMES]
    name, cache = next(((name, cache) for name, cache in found if cache is not None), ("", None))
    return name, cache, model_kwargs.pop("use_cache", True)
