"""
Iterations of fixed shape on a static cache, run as one compiled graph.

Tokens after the end of what is remembered stay in the tensors of a static cache, hidden by the mask, until others are
written over them. So rejected tokens are taken out by setting back the position at which the cache goes on.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from transformers import CompileConfig, GenerationConfig, StaticCache
from transformers.cache_utils import StaticLayer
from transformers.utils import logging

from .._host import attention_implementation, compiles_whole
from ..blocks.limits import count_positions, forgets_between_steps
from .memory import CACHE_NAMES, Memory


logger = logging.get_logger(__name__)

# The graph depends on the length of the cache: round it up, and never shorten it, so that calls share a graph.
_LENGTH_STEP = 256
_LENGTHS: WeakKeyDictionary[Any, int] = WeakKeyDictionary()


class StaticMemory(Memory):
    """A static key/value cache."""

    fixed_shape = True

    def __init__(self, model: Any, cache: StaticCache, batch_size: int, compile_config: CompileConfig | None):
        self.cache: StaticCache = cache
        self.same_length = batch_size > 1
        config = compile_config or CompileConfig(fullgraph=True, dynamic=False)
        self._compiled = model.get_compiled_call(config)
        self._is_prefill = True
        self._num_cached = 0

    @property
    def num_cached(self) -> int:
        return self._num_cached

    @property
    def hides_places(self) -> bool:
        return True

    @property
    def model_inputs(self) -> dict[str, Any]:
        return {"past_key_values": self.cache, "use_cache": True}

    def call(self, model: Any, **inputs: Any) -> Any:
        # The prompt has a length of its own in every call.
        output = model(**inputs) if self._is_prefill else self._compiled(**inputs)
        fed = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
        self._num_cached += fed.shape[1]
        return output

    def settle(self, paths: list[list[int]], num_fed: int) -> bool:
        num_rejected = num_fed - len(paths[0])
        if num_rejected:
            layers: Any = self.cache.layers
            for layer in layers:
                layer.cumulative_length.sub_(num_rejected)  # in place: its address is part of the graph
            self._num_cached -= num_rejected
        return True

    def after_prefill(self) -> Memory:
        self._is_prefill = False
        return self


def make_static_memory(
    model: Any,
    model_kwargs: dict[str, Any],
    batch_size: int,
    max_columns: int,
    num_drafting: int,
    is_user_cache: bool,
    options: GenerationConfig,
) -> StaticMemory | None:
    """Make a static memory, or say once why this model has to go without one."""
    reason = _why_not(model, options, is_user_cache) or _why_too_long(model, max_columns)
    max_columns += num_drafting
    length = max(-(-max_columns // _LENGTH_STEP) * _LENGTH_STEP, _LENGTHS.get(model, 0), options.max_cache_len or 0)
    cache = None
    if not reason:
        cache = StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=length)
        other = {type(layer).__name__ for layer in cache.layers if type(layer) is not StaticLayer}
        reason = f"rejected tokens cannot be taken out of {', '.join(sorted(other))}" if other else ""
    if cache is None or reason:
        logger.warning_once(f"{type(model).__name__} decodes by Jacobi without being compiled: {reason}.")
        return None
    for name in CACHE_NAMES:
        model_kwargs.pop(name, None)
    model_kwargs.pop("use_cache", None)
    _LENGTHS[model] = length
    return StaticMemory(model, cache, batch_size, options.compile_config)


def _why_too_long(model: Any, max_columns: int) -> str:
    """A static cache is made at once, for the longest text that the caller allows."""
    config = model.config.get_text_config(decoder=True)
    num_positions = count_positions(model) or getattr(config, "max_position_embeddings", None) or max_columns
    if max_columns <= num_positions:
        return ""
    return f"prompt, response and a block may take {max_columns} positions, and it was made for {num_positions}"


def _why_not(model: Any, options: GenerationConfig, is_user_cache: bool) -> str:
    """What keeps a model from being compiled; empty if nothing does."""
    devices = {str(device) for device in (getattr(model, "hf_device_map", None) or {}).values()}
    quantizer = getattr(model, "hf_quantizer", None)
    if is_user_cache:
        return "`past_key_values` are given"
    if options.disable_compile:
        return "`disable_compile=True`"
    if model.config.is_encoder_decoder:
        return "it is an encoder-decoder model"
    if not compiles_whole(model) or forgets_between_steps(model):
        return "the host does not compile it into one graph"
    if "flash" in (attention_implementation(model.config) or ""):
        return "flash attention does not hide what is not in use of a static cache"
    if quantizer is not None and not quantizer.is_compileable:
        return "its quantization cannot be compiled"
    if len(devices) > 1 and devices & {"cpu", "disk"}:
        return "parts of it are offloaded"
    return ""
