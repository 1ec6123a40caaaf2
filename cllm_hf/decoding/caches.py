"""
Keeping accepted tokens in a cache: the one place that knows transformers' cache classes.

After a forward pass over drafts the cache also holds rejected tokens. Those that are kept are named by their places in
that forward pass. Of a chain they are the first ones, and the others are cut off; of a tree they move to the front
first. Rows of a batch keep different numbers of them, and stay aligned on the right: every row's tokens are contiguous
and end in the last column, and rows that are behind get more padding on the left. Sliding-window layers, whose masks
count columns, thus stay exact. Columns that are padding in all rows are dropped, so that the cache never grows beyond
the longest row.

A recurrent state cannot be rolled back. It is saved before a forward pass, and put back if anything was rejected.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import DynamicCache, EncoderDecoderCache
from transformers.cache_utils import (
    Cache,
    DummyLayer,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
)


# Layers whose tokens can be moved, and those of which each row can lose another number of them.
_MOVABLE_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer)
_ROW_WISE_LAYERS = (*_MOVABLE_LAYERS, DynamicIndexedLayer)
# Layers that replace their tensors and never write into them, so that whoever holds the old ones still has the past.
_REPLACING_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer, DynamicIndexedLayer)


class StaticRowsLayer(StaticLayer):
    """
    A static layer in which each row goes on at a column of its own: where `next_columns`, `[batch_size]`, says. All
    layers of a device share that tensor, and whoever runs the model writes it. Windows are left to the mask.
    """

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, max_cache_len: int, next_columns: torch.Tensor):
        super().__init__(max_cache_len)
        self.cumulative_length = next_columns  # the name under which transformers gives it a fixed address

    @property
    def next_columns(self) -> torch.Tensor:
        return self.cumulative_length

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        batch_size, _, num_fed, _ = key_states.shape
        rows = torch.arange(batch_size, device=self.device)[:, None]
        columns = self.next_columns[:, None] + torch.arange(num_fed, device=self.device)
        self.keys[rows, :, columns] = key_states.transpose(1, 2)
        self.values[rows, :, columns] = value_states.transpose(1, 2)
        return self.keys, self.values

    def get_seq_length(self) -> Any:
        return (
            self.next_columns[0] if self.is_initialized else 0
        )  # a number, as of other layers; nothing is counted by it


def decoder_cache(cache: Cache) -> Cache:
    """The cache of the decoder's own tokens: of an encoder-decoder cache its self-attention part."""
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def rolls_back_rows(cache: Cache) -> bool:
    """Whether `roll_back` can remove a different number of tokens from each row."""
    return type(cache) is DynamicCache and all(type(layer) in _ROW_WISE_LAYERS for layer in cache.layers)


def keeps_places(cache: Cache) -> bool:
    """Whether `keep_places` can keep other places than the first ones."""
    return type(cache) is DynamicCache and all(type(layer) in _MOVABLE_LAYERS for layer in cache.layers)


def _filled_layers(cache: Cache) -> list[Any]:
    """Layers that hold keys and values."""
    layers: Any = cache.layers
    return [layer for layer in layers if layer.is_initialized and not isinstance(layer, DummyLayer)]


def stop_recording(cache: Cache) -> None:
    """
    Undo `cache.activate_past_recording()`.

    Without a rollback after every forward pass, a layer that records what leaves its window would grow without bound,
    in later uses of the cache too.
    """
    for layer in decoder_cache(cache).layers:
        if hasattr(layer, "record_past"):
            layer.record_past = False


def copy_cache(cache: Cache) -> Cache:
    """Copy a cache, sharing its tensors: layers that grow by concatenation replace them and never write into them."""
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    return copied


def keep_places(cache: Cache, paths: list[list[int]], num_fed: int) -> None:
    """Keep some of the tokens of the last forward pass in each row, and align the rows on the right again."""
    if any(path[-1] >= len(path) for path in paths):
        _move_to_front(cache, paths, num_fed)
    roll_back(cache, [num_fed - len(path) for path in paths])


def roll_back(cache: Cache, num_rejected: list[int]) -> None:
    """
    Remove each row's rejected tokens and align the rows on the right again.

    The cache must record its past (`activate_past_recording`). Must be called after every forward pass, also when
    nothing was rejected: sliding-window layers only then let go of the tokens that left the window.
    """
    fewest = min(num_rejected)
    if max(num_rejected) > fewest:
        for layer in _filled_layers(cache):
            _roll_back_rows(layer, num_rejected)
    else:
        cache.crop(-fewest)


def drop_leading_columns(cache: Cache, count: int) -> None:
    """Remove columns that are padding in every row."""
    for layer in _filled_layers(cache):
        seen = layer.get_seq_length() - count
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length = seen
        surplus = max(layer.keys.shape[-2] - seen, 0)
        layer.keys, layer.values = layer.keys[:, :, surplus:], layer.values[:, :, surplus:]
        if isinstance(layer, DynamicIndexedLayer):
            if layer.indexer_keys is not None:
                layer.indexer_keys = layer.indexer_keys[:, surplus:]
            if layer.indexer_position_ids is not None:
                layer.indexer_position_ids = layer.indexer_position_ids[..., surplus:]


def save_states(cache: Cache) -> list[dict[str, Any]]:
    """
    Save what a cache holds, so that `restore_states` can put it back: keys and values that grow by concatenation are
    shared, recurrent and convolutional states, which layers write into, are copied.
    """
    return [
        {name: _saved(value, isinstance(layer, _REPLACING_LAYERS)) for name, value in vars(layer).items()}
        for layer in cache.layers
    ]


def restore_states(cache: Cache, states: list[dict[str, Any]]) -> None:
    """Put back what `save_states` has saved; the saved values are used up."""
    for layer, saved in zip(cache.layers, states):
        vars(layer).update(saved)


def save_start(cache: Cache) -> list[Any]:
    """
    Save what `restore_start` needs to take a call of `generate` back: of each layer how many columns it holds, where
    nothing else changes while it grows, or else its attributes.
    """
    return [
        layer.get_seq_length() if type(layer) is DynamicLayer and layer.is_initialized else dict(vars(layer))
        for layer in cache.layers
    ]


def restore_start(cache: Cache, start: list[Any]) -> None:
    """Take everything back that a call has done to a cache, whichever of its layers a forward pass had reached."""
    layers: Any = cache.layers
    del layers[len(start) :]  # layers are made as they are reached
    for layer, saved in zip(layers, start):
        if isinstance(saved, int):
            layer.keys, layer.values = (states[..., :saved, :] for states in (layer.keys, layer.values))
        else:
            vars(layer).clear()
            vars(layer).update(saved)


def _saved(value: Any, is_replaced: bool) -> Any:
    if isinstance(value, torch.Tensor):
        return value if is_replaced else value.clone()
    if isinstance(value, (dict, list)):
        copied = copy.copy(value)
        for key in value if isinstance(value, dict) else range(len(value)):
            copied[key] = _saved(value[key], False)
        return copied
    return value


def roll_back_columns(columns: torch.Tensor, num_rejected: list[int], fill: int) -> torch.Tensor:
    """Do to a tensor of per-column values (an attention mask) what `roll_back` does to the cache."""
    fewest = min(num_rejected)
    if max(num_rejected) == fewest:
        return columns[:, : columns.shape[1] - fewest]
    source = _source_columns(num_rejected, 0, columns.shape[1] - fewest, columns.device)
    return columns.gather(1, source.clamp(min=0)).masked_fill(source < 0, fill)


def _move_to_front(cache: Cache, paths: list[list[int]], num_fed: int) -> None:
    """Put the kept places of a forward pass before its others. The layers have just made their tensors for it."""
    places = torch.tensor([path + [place for place in range(num_fed) if place not in path] for path in paths])
    orders: dict[torch.device, torch.Tensor] = {}  # layers may lie on several devices, and most lie on one
    for layer in _filled_layers(cache):
        if layer.device not in orders:
            orders[layer.device] = places.to(layer.device, non_blocking=True)[:, None, :, None]
        order = orders[layer.device]
        for states in (layer.keys, layer.values):
            fed = states[:, :, -num_fed:]
            fed.copy_(fed.gather(2, order.expand_as(fed)))


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
    if isinstance(layer, DynamicIndexedLayer):
        if layer.indexer_keys is not None:
            layer.indexer_keys = layer.indexer_keys[rows, source]
        if layer.indexer_position_ids is not None:
            layer.indexer_position_ids = layer.indexer_position_ids[:, rows, source]


def _source_columns(num_rejected: list[int], start: int, end: int, device: torch.device) -> torch.Tensor:
    """For each row, the old column that becomes new column `start .. end - 1`; negative ones are padding."""
    shift = torch.tensor([count - min(num_rejected) for count in num_rejected]).to(device, non_blocking=True)
    return torch.arange(start, end, device=device)[None, :] - shift[:, None]
