"""
Continuous batching: greedy responses to many prompts, where a response that ends makes room for the next prompt.

Rows stand in the first columns of keys and values that have room, whatever the lengths of the others, so that
nothing is copied as they grow. `generate` decodes a batch until its longest response ends, and has every key and value
copied for each token. `generate_batch` of transformers is made for GPUs and pages of a cache: for 16 responses of 32
tokens of SmolLM2-135M-Instruct on a CPU it took 24 s, start-up included, and this 7 s in the same run.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import psutil
import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from .._host import CACHE_NAME, input_device
from ..blocks.forward import forward_clean, masks_by_layer_type


# Rows beyond these only share out the same work: the cores of a CPU are busy before a GPU is.
_MOST_ROWS, _MOST_ROWS_ON_CPU = 512, 64
_SHARE_OF_MEMORY = 0.25  # that keys and values may take
_COLUMNS_AT_ONCE = 256  # by which keys and values grow


class _RowsLayer(DynamicLayer):
    """
    Keys and values of a layer: `[num_rows, num_heads, num_columns, head_size]`, row by row from the first column on.

    A forward pass is over one token of each of the first rows, at the columns that `cursor` holds, and reads `used`
    columns.
    """

    keys: torch.Tensor
    values: torch.Tensor
    cursor: torch.Tensor  # [num_active]
    used: int = 0

    def __init__(self, num_rows: int):
        super().__init__()
        self._num_rows = num_rows

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (
            states.new_empty((self._num_rows, states.shape[1], 0, states.shape[-1]))
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._make_room(self.used)
        cursor, count = self.cursor.to(self.device), len(key_states)
        rows = torch.arange(count, device=self.device)
        self.keys[rows, :, cursor], self.values[rows, :, cursor] = key_states[:, :, 0], value_states[:, :, 0]
        return self.keys[:count, :, : self.used], self.values[:count, :, : self.used]

    def get_seq_length(self) -> int:
        return max(self.used - 1, 0)

    def admit(self, first: int, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Put rows that were read elsewhere after the first `first` ones."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        count, _, length, _ = key_states.shape
        self._make_room(length)
        self.keys[first : first + count, :, :length] = key_states
        self.values[first : first + count, :, :length] = value_states

    def move(self, source: int, target: int, length: int) -> None:
        """Put a row in the place of one that has ended."""
        for stored in (self.keys, self.values):
            stored[target, :, :length] = stored[source, :, :length]

    def _make_room(self, num_columns: int) -> None:
        missing = -(-(num_columns - self.keys.shape[2]) // _COLUMNS_AT_ONCE) * _COLUMNS_AT_ONCE
        if missing > 0:
            # Zeros: the mask hides columns that are not in use, but what is not a number would show through it.
            self.keys, self.values = (pad(stored, (0, 0, 0, missing)) for stored in (self.keys, self.values))


class ContinuousBatch:
    """
    Greedy responses by the plain argmax, up to their stop tokens, for a model whose forward passes can be packed.

    Args:
        model: in evaluation mode.
        max_new_tokens: longest response.
        stop_ids: tokens that end a response; it keeps them.
        num_rows: responses that are decoded at once.
        tokens_per_prefill: tokens of prompts that are read at once, padding included.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        max_new_tokens: int,
        stop_ids: Collection[int],
        num_rows: int,
        tokens_per_prefill: int,
    ):
        self.model, self.max_new_tokens, self.stop_ids = model, max_new_tokens, frozenset(stop_ids)
        self.num_rows, self.tokens_per_prefill = num_rows, tokens_per_prefill
        self._device = input_device(model)

    @torch.no_grad()
    def run(self, prompts: list[list[int]], say: Callable[[int], None] = lambda done: None) -> list[list[int]]:
        """The responses to prompts, longest ones first as memory goes; `say` is told how many have ended."""
        waiting = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        self._prompts = prompts
        self._responses: list[list[int]] = [[] for _ in prompts]
        self._cache = Cache(layers=[])
        said = 0
        self._active: list[int] = []  # the prompt of each row in use
        while self._active or waiting:
            # Prompts are read several at once: a forward pass over one of them is not worth the others' waiting.
            if waiting and (self.num_rows - len(self._active)) * 8 >= self.num_rows:
                self._admit(waiting)
            else:
                self._step()
            ended = len(prompts) - len(waiting) - len(self._active)
            if ended > said:
                said = ended
                say(said)
        return self._responses

    def _admit(self, waiting: list[int]) -> None:
        """Read the next prompts, and take their first tokens."""
        chosen: list[int] = []
        while waiting and len(self._active) + len(chosen) < self.num_rows:
            longest = len(self._prompts[(chosen or waiting[-1:])[0]])
            if chosen and (len(chosen) + 1) * longest > self.tokens_per_prefill:
                break
            chosen.append(waiting.pop())
        rows = [torch.tensor(self._prompts[index]) for index in chosen]
        ids = pad_sequence(rows, batch_first=True).to(self._device)
        lengths = torch.tensor([len(row) for row in rows], device=self._device)
        mask = (torch.arange(ids.shape[1], device=self._device) < lengths[:, None]).long()
        last = torch.arange(len(rows), device=self._device) * ids.shape[1] + lengths - 1
        logits, cache = forward_clean(self.model, ids, mask, 1, places=last)
        self._take_over(cache)
        self._active += chosen
        self._write(len(self._active) - len(chosen), logits)

    def _take_over(self, read: DynamicCache) -> None:
        layers: Any = read.layers
        if not self._cache.layers:
            self._cache.layers += [_RowsLayer(min(self.num_rows, len(self._prompts))) for _ in layers]
        own: Any = self._cache.layers
        for layer, found in zip(own, layers):
            if found.is_initialized:
                layer.admit(len(self._active), found.keys, found.values)

    def _step(self) -> None:
        """One token of each row."""
        tokens = [self._responses[index][-1] for index in self._active]
        lengths = [len(self._prompts[index]) + len(self._responses[index]) for index in self._active]
        ids = torch.tensor(tokens).to(self._device, non_blocking=True)[:, None]
        cursor = torch.tensor(lengths).to(self._device, non_blocking=True) - 1
        used = max(lengths)
        layers: Any = self._cache.layers
        for layer in layers:
            layer.cursor, layer.used = cursor, used
        distances = cursor[:, None, None] - torch.arange(used, device=self._device)
        config = self.model.config.get_text_config()
        inputs = {
            "input_ids": ids,
            "attention_mask": masks_by_layer_type(config, distances >= 0, distances, self.model.dtype),
            "position_ids": cursor[:, None],
            CACHE_NAME: self._cache,
            "use_cache": True,
        }
        self._write(0, self.model(**inputs).logits[:, -1])

    def _write(self, first: int, logits: torch.Tensor) -> None:
        """Add a token to the rows from the first one on, and let go of those that it ends."""
        for index, token in zip(self._active[first:], logits.argmax(-1).tolist()):
            self._responses[index].append(token)
        for row in reversed(range(first, len(self._active))):
            response = self._responses[self._active[row]]
            if response[-1] in self.stop_ids or len(response) == self.max_new_tokens:
                self._release(row)

    def _release(self, row: int) -> None:
        last = self._active.pop()
        if row == len(self._active):
            return
        self._active[row] = last
        layers: Any = self._cache.layers
        for layer in layers:
            if layer.is_initialized:
                layer.move(len(self._active), row, len(self._prompts[last]) + len(self._responses[last]))


def count_rows(model: PreTrainedModel, num_columns: int) -> int:
    """How many responses a device decodes at once, for rows of so many tokens: the same on every run."""
    device = input_device(model)
    cached = _bytes_per_token(model) * num_columns
    fitting = int(_total_memory(device) * _SHARE_OF_MEMORY / max(cached, 1))
    return max(1, min(fitting, _MOST_ROWS_ON_CPU if device.type == "cpu" else _MOST_ROWS))


@torch.no_grad()
def _bytes_per_token(model: PreTrainedModel) -> int:
    """What keys and values of a token take."""
    token = torch.zeros((1, 1), dtype=torch.long, device=input_device(model))
    _, cache = forward_clean(model, token, torch.ones_like(token), 1)
    layers: Any = cache.layers
    tensors = [tensor for layer in layers if layer.is_initialized for tensor in (layer.keys, layer.values)]
    return sum(tensor.nbytes for tensor in tensors)


def _total_memory(device: torch.device) -> int:
    """What a device has, whether it is in use or not, so that a run that goes on decodes the same batches."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total
