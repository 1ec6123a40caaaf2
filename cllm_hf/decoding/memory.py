"""
What a model remembers of the tokens it has been fed, and how it forgets the rejected ones among them.

`choose_memory` picks one of three ways for a model and its cache:

- `Memory` itself: nothing is remembered; every forward pass is over the whole sequence.
- `CroppedMemory`: a key/value cache, from which rejected tokens are cut out.
- `ReplayedMemory`: a recurrent state, which is put back when a token was rejected; the tokens since then are fed again
  together with the next draft.

A compiled model gets a `StaticMemory`, a cache of fixed shape, where it allows one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import CompileConfig, DynamicCache, GenerationConfig, StaticCache
from transformers.cache_utils import (
    BaseQuantizedLayer,
    Cache,
    DynamicLayer,
    LinearAttentionCacheLayerMixin,
    StaticLayer,
)
from transformers.utils import logging

from .._host import CACHE_NAME, CACHE_NAMES, attention_implementation, compiles_whole, input_device
from ..blocks.forward import rows_attention_mask
from ..blocks.limits import check_packable, count_positions, limits_of
from .caches import (
    StaticRowsLayer,
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
    stop_recording,
)


# A compiled graph depends on the length of the cache: round it up, and never shorten it, so that calls share a graph.
_LENGTH_STEP = 256
_LENGTH_SO_FAR = "_cllm_hf_cache_length"  # attribute of a model
_COMPILED_SHAPES = "_cllm_hf_compiled_shapes"  # another
# A static cache is made for the longest text, and read as a whole for every token: larger ones must be asked for.
_MOST_TOKENS_UNASKED = 8192


@dataclass(frozen=True)
class Compiling:
    """That forward passes are to be compiled, where the model can be."""

    config: GenerationConfig
    is_asked: bool  # or chosen for the device
    # Compiles another function in place of the model's own call, which gives the same output.
    compile_call: Callable[[CompileConfig], Callable[..., Any]] | None = None


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
        static = _make_static(model, batch_size, is_user_cache, compiling, max_columns, num_drafting)
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


class StaticMemory(Memory):
    """
    A static key/value cache, for iterations of fixed shape that run as one compiled graph.

    Tokens after the end of what is remembered stay in the tensors, hidden by the mask, until others are written over
    them. So rejected tokens are taken out by setting back the column at which a row goes on. A row that leaves the
    batch leaves its place empty: what is fed there is fed for nothing.
    """

    fixed_shape = True

    def __init__(self, model: Any, cache: Cache, batch_size: int, runner: CompiledStep):
        self.cache: Cache = cache
        self._compiled = runner
        self._is_prefill, self._num_fed = True, 0
        self._lengths = [0] * batch_size  # columns of each place that hold what is remembered
        self._places = list(range(batch_size))  # of the rows that are still there

    @property
    def num_cached(self) -> int:
        return max(self._lengths)

    @property
    def hides_places(self) -> bool:
        return True

    def fill(self, fed: list[Any]) -> list[Any]:
        """What to feed at all places, from what is fed for the rows that are still there."""
        if len(fed) == len(self._lengths):
            return fed
        filled = [fed[0]] * len(self._lengths)
        for place, one in zip(self._places, fed):
            filled[place] = one
        return filled

    def mask(self, config: Any, dtype: torch.dtype, text_mask: torch.Tensor | None, parents: Any, num_fed: int) -> Any:
        """The mask of a forward pass after the prefill: each row goes on at a column of its own."""
        layer: Any = next(layer for layer in self.cache.layers if isinstance(layer, StaticRowsLayer))
        device = layer.device if text_mask is None else text_mask.device
        lengths = torch.tensor(self._lengths).to(device, non_blocking=True)
        filled = None if parents is None else self.fill(parents)
        return rows_attention_mask(config, text_mask, lengths, filled, num_fed, layer.max_cache_len, dtype)

    def begin(self, draft_length: int) -> None:
        lengths = torch.tensor(self._lengths)
        layers: Any = self.cache.layers
        shared = {id(layer.next_columns): layer.next_columns for layer in layers if isinstance(layer, StaticRowsLayer)}
        for next_columns in shared.values():
            next_columns.copy_(lengths, non_blocking=True)  # in place: its address is part of the graph

    def call(self, model: Any, **inputs: Any) -> Any:
        fed = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
        self._num_fed = fed.shape[1]
        if self._is_prefill:  # the prompt has a length of its own in every call
            return model(**inputs)
        output = self._compiled(**inputs)
        output.logits = self.rows_of(output.logits)
        return output

    def rows_of(self, values: torch.Tensor) -> torch.Tensor:
        if len(self._places) == len(self._lengths):
            return values
        return values[torch.tensor(self._places).to(values.device, non_blocking=True)]

    def settle(self, paths: list[list[int]], num_fed: int) -> bool:
        for place, path in zip(self._places, paths):
            self._lengths[place] += self._num_fed - (num_fed - len(path))
        return True

    def after_prefill(self) -> Memory:
        self._is_prefill = False
        return self

    def result(self) -> Cache | None:
        cache = DynamicCache()
        layers: Any = self.cache.layers
        for index, layer in enumerate(layers):
            if isinstance(layer, StaticRowsLayer) and layer.is_initialized:
                keys, values = (states[:, :, : self._lengths[0]].clone() for states in (layer.keys, layer.values))
                cache.update(keys, values, index)
        return cache

    def keep(self, left: list[int]) -> None:
        """Let the other rows go."""
        if not left:
            return
        self._places = [self._places[index] for index in left]
        for place in set(range(len(self._lengths))) - set(self._places):
            self._lengths[place] = 0  # so that it does not come to the end of the cache


class CompiledStep:
    """
    A model's forward pass as one compiled graph. It is compiled when it is first run in a shape, which takes half a
    minute: where nobody has asked for it, that is said, and what cannot be compiled here runs as it is.
    """

    def __init__(self, model: Any, compiling: Compiling):
        self._model, self._is_asked = model, compiling.is_asked
        self._kind = compiling.compile_call is not None  # of graph
        config = compiling.config.compile_config or CompileConfig(fullgraph=True, dynamic=False)
        self._run = (compiling.compile_call or model.get_compiled_call)(config)

    def __call__(self, **inputs: Any) -> Any:
        shape = tuple((inputs["input_ids"]).shape)
        graph = (*shape, self._kind)
        known = vars(self._model).setdefault(_COMPILED_SHAPES, set())
        if self._is_asked or graph in known:
            return self._run(**inputs)
        log, kind, start = logging.get_logger(__name__), type(self._model).__name__, time.perf_counter()
        log.warning(
            f"{kind} is compiled for Jacobi decoding of {shape[0]} x {shape[1]} tokens, once. "
            "`jacobi_compile=False` decodes without."
        )
        try:
            output = self._run(**inputs)
        except Exception as error:  # of the compiler, or of what it lacks here: nothing has run yet
            log.warning(f"{kind} decodes by Jacobi without being compiled: {str(error).strip().splitlines()[0]}")
            self._run = self._model
            return self._run(**inputs)
        known.add(graph)
        log.warning(f"Compiled in {time.perf_counter() - start:.0f} s.")
        return output


def _make_static(
    model: Any,
    batch_size: int,
    is_user_cache: bool,
    compiling: Compiling,
    max_columns: int,
    num_drafting: int,
) -> StaticMemory | None:
    """Make a static memory, or say once why this model has to go without one, if one was asked for."""
    options = compiling.config
    reason = _why_not_compiled(model, options, is_user_cache) or _why_too_long(model, max_columns)
    if not compiling.is_asked and max_columns * batch_size > _MOST_TOKENS_UNASKED:
        reason = reason or "it may become long"
    if reason:
        if compiling.is_asked:
            message = f"{type(model).__name__} decodes by Jacobi without being compiled: {reason}."
            logging.get_logger(__name__).warning_once(message)
        return None
    needed = -(-(max_columns + num_drafting) // _LENGTH_STEP) * _LENGTH_STEP
    length = max(needed, vars(model).get(_LENGTH_SO_FAR, 0), options.max_cache_len or 0)
    setattr(model, _LENGTH_SO_FAR, length)
    kinds = StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=length).layers
    next_columns = torch.zeros(batch_size, dtype=torch.long, device=input_device(model))
    layers = [StaticRowsLayer(length, next_columns) if isinstance(one, StaticLayer) else one for one in kinds]
    runner = CompiledStep(model, compiling)
    return StaticMemory(model, Cache(layers=layers), batch_size, runner)


def _why_too_long(model: Any, max_columns: int) -> str:
    """A static cache is made at once, for the longest text that the caller allows."""
    config = model.config.get_text_config(decoder=True)
    num_positions = count_positions(model) or getattr(config, "max_position_embeddings", None) or max_columns
    if max_columns <= num_positions:
        return ""
    return f"prompt, response and a block may take {max_columns} positions, and it was made for {num_positions}"


def _why_not_compiled(model: Any, options: GenerationConfig, is_user_cache: bool) -> str:
    """What keeps a model from being compiled; empty if nothing does."""
    devices = {str(device) for device in (getattr(model, "hf_device_map", None) or {}).values()}
    quantizer = getattr(model, "hf_quantizer", None)
    if is_user_cache:
        return "`past_key_values` are given"
    if options.disable_compile:
        return "`disable_compile=True`"
    if model.config.is_encoder_decoder:
        return "it is an encoder-decoder model"
    if not compiles_whole(model) or limits_of(model).no_later_steps:
        return "transformers does not compile it into one graph"
    if "flash" in (attention_implementation(model.config) or ""):
        return "flash attention does not hide what is not in use of a static cache"
    if quantizer is not None and not quantizer.is_compileable:
        return "its quantization cannot be compiled"
    if len(devices) > 1 and devices & {"cpu", "disk"}:
        return "parts of it are offloaded"
    try:
        check_packable(model)  # its masks are made here
    except ValueError as error:
        return f"its masks cannot be made row by row. {error}"
    return ""
