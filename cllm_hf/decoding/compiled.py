"""
Iterations as one compiled graph: the model's forward pass, the static cache that it needs, and for which models.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import CompileConfig, DynamicCache, GenerationConfig, StaticCache
from transformers.cache_utils import Cache, StaticLayer
from transformers.utils import logging

from .._host import attention_implementation, compiles_whole, input_device
from ..blocks.forward import rows_attention_mask
from ..blocks.limits import check_packable, count_positions, limits_of
from .caches import StaticRowsLayer
from .memory import Memory


# A compiled graph depends on the length of the cache: round it up, and never shorten it, so that calls share a graph.
_LENGTH_STEP = 256
_LENGTH_SO_FAR = "_cllm_hf_cache_length"  # attribute of a model
_GRAPHS = "_cllm_hf_graphs"  # another
_FAILED = "_cllm_hf_compiling_failed"  # another: nobody waits for the same failure in every call
# A static cache is made for the longest text, and read as a whole for every token: larger ones must be asked for.
_MOST_TOKENS_UNASKED = 8192


@dataclass(frozen=True)
class Compiling:
    """That forward passes are to be compiled, where the model can be."""

    config: GenerationConfig
    is_asked: bool  # or chosen for the device
    # Compiles another function in place of the model's own call, which gives the same output.
    compile_call: Callable[[CompileConfig], Callable[..., Any]] | None = None


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
        """The mask of a forward pass that has begun, after the prefill: each row goes on at a column of its own."""
        layer: Any = next(layer for layer in self.cache.layers if isinstance(layer, StaticRowsLayer))
        lengths = layer.next_columns if text_mask is None else layer.next_columns.to(text_mask.device)
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


class _Graphs:
    """What is compiled of a model. A copy of the model compiles anew, since these calls are calls of this one."""

    def __init__(self) -> None:
        self.known: set[tuple[Any, ...]] = set()  # what each graph is for
        self._compiled: tuple[CompileConfig, Callable[..., Any]] | None = None

    def __reduce__(self) -> Any:
        return type(None), ()

    def call_of(self, model: Any, config: CompileConfig) -> Callable[..., Any]:
        """The model's own call, compiled."""
        if self._compiled is None or self._compiled[0] != config:
            self._compiled = config, torch.compile(model.__call__, **config.to_dict())
        return self._compiled[1]


class CompiledStep:
    """
    A model's forward pass as one compiled graph. It is compiled when it is first run in a shape, which takes half a
    minute: where nobody has asked for it, that is said, and what cannot be compiled here runs as it is.
    """

    def __init__(self, model: Any, compiling: Compiling):
        self._model, self._is_asked = model, compiling.is_asked
        self._kind = compiling.compile_call is not None  # of graph
        config = compiling.config.compile_config or CompileConfig(fullgraph=True, dynamic=False)
        self._graphs: _Graphs = vars(model).get(_GRAPHS) or _Graphs()
        vars(model)[_GRAPHS] = self._graphs
        self._run = compiling.compile_call(config) if compiling.compile_call else self._graphs.call_of(model, config)

    def __call__(self, **inputs: Any) -> Any:
        shape = tuple(inputs["input_ids"].shape)
        graph = (*shape, self._kind, vars(self._model)[_LENGTH_SO_FAR])
        if self._is_asked or graph in self._graphs.known:
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
            setattr(self._model, _FAILED, True)
            self._run = self._model
            return self._run(**inputs)
        self._graphs.known.add(graph)
        log.warning(f"Compiled in {time.perf_counter() - start:.0f} s.")
        return output


def make_static(
    model: Any,
    batch_size: int,
    is_user_cache: bool,
    compiling: Compiling,
    max_columns: int,
    num_drafting: int,
) -> StaticMemory | None:
    """Make a static memory, or say once why this model has to go without one, if one was asked for."""
    if not compiling.is_asked and vars(model).get(_FAILED):
        return None  # said when it failed
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
