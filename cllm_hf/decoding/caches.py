"""
Rollback of a key/value cache: the one place that knows the host's cache classes.

After a forward over drafts the cache also holds rejected tokens. Rows of a batch reject different numbers of them. The
rows are kept aligned on the right: every row's tokens stay contiguous and end in the last column, and rows that are
behind get more padding on the left. Sliding-window layers, whose masks count columns, thus stay exact, and the cache
never grows beyond the longest row.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer


_ROW_WISE_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)


def check_cache(cache: object, batch_size: int) -> Cache:
    """
    Check that `roll_back` can undo the rejected tokens of this cache.

    Args:
        cache (`object`): the `past_key_values` that `generate` prepared.
        batch_size (`int`): number of rows that will be decoded.

    Returns:
        `transformers.Cache`: the same object.

    Raises:
        ValueError: if there is no dynamic cache, if it holds recurrent states, or if its layers cannot roll back each
            row of a batch on its own.
    """
    if not isinstance(cache, DynamicCache):
        raise ValueError(
            f'`decoding="jacobi"` needs a dynamic key/value cache, got {type(cache).__name__}. Drop '
            '`cache_implementation` and static or quantized caches, or pass `decoding="autoregressive"`.'
        )
    if not cache.is_croppable:
        raise ValueError(
            '`decoding="jacobi"` takes back rejected tokens, which the recurrent or convolutional state of this model '
            'does not allow. Pass `decoding="autoregressive"` for it.'
        )
    other = {type(layer).__name__ for layer in cache.layers if type(layer) not in _ROW_WISE_LAYERS}
    if batch_size > 1 and other:
        raise ValueError(
            f'`decoding="jacobi"` decodes this model one row at a time only: its cache has layers of type '
            f"{', '.join(sorted(other))}, got a batch of {batch_size}. Generate the rows one by one, or pass "
            '`decoding="autoregressive"`.'
        )
    return cache


@contextmanager
def recording(cache: Cache) -> Iterator[None]:
    """
    Have sliding-window layers keep what leaves their window until the next rollback, and stop that afterwards.

    Without a rollback after every forward, such a layer would grow without bound, in later uses of the cache too.

    Args:
        cache (`transformers.Cache`): a cache that `check_cache` has accepted.
    """
    cache.activate_past_recording()
    try:
        yield
    finally:
        for layer in cache.layers:
            if isinstance(layer, DynamicSlidingWindowLayer):
                layer.record_past = False


def copy_cache(cache: Cache) -> Cache:
    """
    Copy a cache, sharing its tensors: layers that grow by concatenation replace them and never write into them.

    Args:
        cache (`transformers.Cache`): a cache that `check_cache` accepts for a batch.

    Returns:
        `transformers.Cache`: what happens to it leaves the original as it is.
    """
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    return copied


def roll_back(cache: Cache, num_rejected: list[int]) -> None:
    """
    Remove each row's rejected tokens and align the rows on the right again.

    The cache must be `recording`. Must be called after every forward, also when
    nothing was rejected: sliding-window layers only then let go of the tokens that left the window.

    Args:
        cache (`transformers.Cache`): a cache that `check_cache` has accepted.
        num_rejected (`list[int]`): for each row, how many of its last tokens to remove.
    """
    fewest = min(num_rejected)
    if max(num_rejected) > fewest:
        layers: Any = cache.layers
        for layer in layers:
            if layer.is_initialized:
                _roll_back_rows(layer, num_rejected)
    else:
        cache.crop(-fewest)


def roll_back_columns(columns: torch.Tensor, num_rejected: list[int], fill: int) -> torch.Tensor:
    """
    Do to a tensor of per-column values (an attention mask) what `roll_back` does to the cache.

    Args:
        columns (`torch.Tensor` of shape `(batch_size, length)`): one value for each column of the cache.
        num_rejected (`list[int]`): for each row, how many of its last columns to remove.
        fill (`int`): value of the columns that become padding.

    Returns:
        `torch.Tensor` of shape `(batch_size, length - min(num_rejected))`.
    """
    source = _source_columns(num_rejected, 0, columns.shape[1] - min(num_rejected), columns.device)
    return columns.gather(1, source.clamp(min=0)).masked_fill(source < 0, fill)


def _roll_back_rows(layer: Any, num_rejected: list[int]) -> None:
    fewest = min(num_rejected)
    stored = layer.keys.shape[-2]
    # `seen` counts all columns up to now; a sliding-window layer stores the last ones only.
    seen = layer.get_seq_length()
    start, end = 0, seen - fewest
    if isinstance(layer, DynamicSlidingWindowLayer):
        if seen >= layer.sliding_window:
            start = max(0, end - (layer.sliding_window - 1))
        layer.cumulative_length = end
    # Columns before a row's first token are padding: whatever they hold is hidden by the attention mask.
    source = (_source_columns(num_rejected, start, end, layer.device) - (seen - stored)).clamp(min=0)
    rows = torch.arange(len(num_rejected), device=layer.device)[:, None]
    layer.keys, layer.values = (
        states.transpose(1, 2)[rows, source].transpose(1, 2) for states in (layer.keys, layer.values)
    )


def _source_columns(num_rejected: list[int], start: int, end: int, device: torch.device) -> torch.Tensor:
    """For each row, the old column that becomes new column `start .. end - 1`; negative ones are padding."""
    shift = torch.tensor([count - min(num_rejected) for count in num_rejected], device=device)
    return torch.arange(start, end, device=device)[None, :] - shift[:, None]
