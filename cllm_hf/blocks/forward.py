"""Forward passes over packed batches, in one go or after cached clean sequences, and the masks of blocks and trees."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import StaticLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from .._host import CACHE_NAME, attention_implementation, input_device
from .layout import CLEAN_SEGMENT, Packed


# Logits that are computed at once where they are only looked through: a gigabyte in float32.
_MOST_LOGITS = 2**28
_ENDS_IN_HEAD = "_cllm_hf_ends_in_head"  # attribute of a model
_Reduce = Callable[[torch.Tensor, slice], list[torch.Tensor]]


def packed_attention_mask(
    config: PreTrainedConfig,
    packed: Packed,
    dtype: torch.dtype = torch.float32,
    clean_cache: DynamicCache | None = None,
) -> Any:
    """
    Build the `attention_mask` of a packed batch, by transformers' own mask functions, for the attention that the model
    runs: a mask, or a `dict` of them for models that mix full and sliding attention. With `clean_cache` it has only
    the rows of the drafts.
    """
    config = config.get_text_config()
    first = 0 if clean_cache is None else packed.clean_length
    queries, keys = slice(first, None), packed.segment_ids[:, None]
    positions, anchors = packed.position_ids, packed.anchor_positions[:, queries, None]
    columns = torch.arange(positions.shape[1], device=positions.device)
    clean_before = (keys == CLEAN_SEGMENT) & (positions[:, None] < anchors)
    same_segment = keys == packed.segment_ids[:, queries, None]
    visible = (clean_before | same_segment) & (columns <= columns[queries, None])
    if packed.sequence_ids is not None:
        visible &= packed.sequence_ids[:, None] == packed.sequence_ids[:, queries, None]
    # By position, not by column as in transformers: a block stands far after the tokens it continues.
    distances = positions[:, queries, None] - positions[:, None]
    return masks_by_layer_type(config, visible, distances, dtype)


def tree_attention_mask(
    config: PreTrainedConfig,
    text_mask: torch.Tensor,
    parents: list[list[int]],
    dtype: torch.dtype,
    cache: Any,
    num_cached: int | None = None,
) -> Any:
    """
    Build the mask of trees of tokens after texts: each token sees its text and the tokens it follows.

    `text_mask`, `[batch_size, num_columns]`, is non-zero on columns before the trees that are text: `num_cached` of
    them, by default all, are in `cache`, and the others are fed with the trees. `parents` says for each row and place
    of its tree the place of the token before; -1 for none.
    """
    config, device = config.get_text_config(), text_mask.device
    num_rows, num_columns = text_mask.shape
    num_cached, num_places = num_columns if num_cached is None else num_cached, len(parents[0])
    trees = {id(places): ancestors(places) for places in parents}  # rows of a batch often share one
    sees = torch.from_numpy(np.stack([trees[id(places)] for places in parents])).to(device)
    before_tree = text_mask.bool()[:, None].expand(-1, num_places, -1)
    visible = torch.cat([before_tree, sees], dim=-1)
    fed_before = torch.arange(num_cached, num_columns, device=device)
    if len(fed_before):
        keys = torch.arange(num_columns + num_places, device=device)
        # Padding sees itself, so that no place sees nothing; nobody sees it.
        causal = torch.nn.functional.pad(text_mask.bool(), (0, num_places))[:, None] & (keys <= fed_before[:, None])
        visible = torch.cat([causal | (keys == fed_before[:, None]), visible], dim=1)
    layers: Any = cache.layers
    if any(isinstance(layer, StaticLayer) for layer in layers):  # columns that are not in use yet
        visible = torch.nn.functional.pad(visible, (0, layers[0].max_cache_len - visible.shape[-1]))
    if not _has_windows(config):
        return masks_by_layer_type(config, visible, None, dtype)
    # A tree stands in columns of its own; in a text, a token would stand as many columns on as tokens are before it.
    columns = torch.arange(num_columns, device=device).expand(num_rows, -1)
    columns = torch.cat([columns, num_columns + sees.sum(-1) - 1], dim=1)
    queries = columns[:, num_cached:, None]
    columns = torch.nn.functional.pad(columns, (0, visible.shape[-1] - columns.shape[1]))
    distances = queries - columns[:, None]
    sliding = next((index for index, layer in enumerate(layers) if layer.is_sliding), None)
    num_sliding = None if sliding is None else cache.get_mask_sizes(visible.shape[1], sliding)[0]
    return masks_by_layer_type(config, visible, distances, dtype, num_sliding)


def rows_attention_mask(
    config: PreTrainedConfig,
    text_mask: torch.Tensor | None,
    lengths: torch.Tensor,
    parents: list[list[int]] | None,
    num_fed: int,
    num_columns: int,
    dtype: torch.dtype,
) -> Any:
    """
    Build the mask of a forward pass over a static cache in which each row goes on at a column of its own.

    A row has `lengths[row]` columns of text, of which the first ones are those of `text_mask`, `[batch_size, ..]`, and
    the others are all tokens; what is fed comes next. `parents` says what each fed token follows, as for
    `tree_attention_mask`; without, each follows the one before it.
    """
    config, device = config.get_text_config(), lengths.device
    columns, fed = torch.arange(num_columns, device=device), torch.arange(num_fed, device=device)
    is_token = None
    if text_mask is not None:
        missing = num_columns - text_mask.shape[1]
        is_token = torch.nn.functional.pad(text_mask.bool(), (0, missing), value=True) | (columns >= lengths[:, None])
    if parents is None:
        depths = lengths[:, None] + fed  # where a fed token stands in its text: here in its column
        visible, stands = columns <= depths[..., None], columns
    else:
        trees = {id(places): ancestors(places) for places in parents}
        sees = torch.from_numpy(np.stack([trees[id(places)] for places in parents])).to(device)
        places = columns - lengths[:, None]  # [batch_size, num_columns]: of what is fed
        is_fed, places = (places >= 0) & (places < num_fed), places.clamp(0, num_fed - 1)
        depths = lengths[:, None] + sees.sum(-1) - 1
        visible = sees.gather(2, places[:, None].expand(-1, num_fed, -1)) & is_fed[:, None]
        visible |= (columns < lengths[:, None])[:, None]
        stands = torch.where(is_fed, depths.gather(1, places), columns)[:, None]
    if is_token is not None:
        visible &= is_token[:, None]
    distances = depths[..., None] - stands if _has_windows(config) else None
    return masks_by_layer_type(config, visible, distances, dtype)


def ancestors(parents: list[int]) -> np.ndarray:
    """Which places of a tree each place follows, itself among them: `[num_places, num_places]`."""
    sees = np.eye(len(parents), dtype=bool)
    for place, parent in enumerate(parents):
        if parent >= 0:
            sees[place] |= sees[parent]
    return sees


def masks_by_layer_type(
    config: PreTrainedConfig,
    visible: torch.Tensor,
    distances: torch.Tensor | None,
    dtype: torch.dtype,
    num_sliding_columns: int | None = None,
) -> Any:
    """
    Make masks by transformers' own mask functions, for the attention that the model runs.

    `visible` says which pairs see each other where attention is full, `distances` how far a key stands before its
    query, for models with sliding windows: both `[batch_size, num_queries, num_keys]`. `num_sliding_columns` are the
    last keys that layers of sliding windows have; by default all.
    """

    implementation = attention_implementation(config)

    def build(allowed: torch.Tensor) -> Any:
        if implementation == "sdpa":  # what transformers' function makes of it, in less time
            return allowed[:, None]
        return ALL_MASK_ATTENTION_FUNCTIONS[implementation](
            batch_size=allowed.shape[0],
            q_length=allowed.shape[1],
            kv_length=allowed.shape[2],
            mask_function=lambda batch, head, query, key: allowed[batch, query, key],
            allow_is_causal_skip=False,
            dtype=dtype,
            config=config,
            device=allowed.device,
        )

    window: Any = getattr(config, "sliding_window", None)
    if distances is None or not _has_windows(config):
        return build(visible)
    near = visible & (distances < window)
    near = near if num_sliding_columns is None else near[..., -num_sliding_columns:]
    has_types = bool(getattr(config, "layer_types", None))
    return {"full_attention": build(visible), "sliding_attention": build(near)} if has_types else build(near)


def _has_windows(config: PreTrainedConfig) -> bool:
    """Whether some layers of a decoder see a sliding window only."""
    layer_types = set(getattr(config, "layer_types", None) or ())
    return "sliding_attention" in layer_types or (
        not layer_types and getattr(config, "sliding_window", None) is not None
    )


def packed_forward(
    model: torch.nn.Module,
    packed: Packed,
    base_model: PreTrainedModel | None = None,
    places: torch.Tensor | None = None,
    clean_cache: DynamicCache | None = None,
    reduce: _Reduce | None = None,
) -> Any:
    """
    Run one forward pass over a packed batch, or over its drafts alone, after clean sequences from `forward_clean`.

    `base_model` is the one in the wrappers of `model` (PEFT, DDP, FSDP), if there are any. Logits are
    `[batch_size, num_columns, vocab_size]`. With `places`, each `row * num_columns + column`, they are
    `[num_places, vocab_size]`, and logits of no other place are computed; with `reduce` too, see `reduce_logits`. The
    cache is left as it was.
    """
    inner: Any = base_model or model
    fed = slice(0 if clean_cache is None else packed.clean_length, None)
    inputs = {
        "input_ids": packed.input_ids[:, fed],
        "attention_mask": packed_attention_mask(inner.config, packed, inner.dtype, clean_cache),
        "position_ids": packed.position_ids[:, fed],
        "use_cache": clean_cache is not None,
    }
    if clean_cache is not None:
        inputs[CACHE_NAME] = clean_cache
    if places is None:
        logits = model(**inputs).logits
    elif reduce is None:
        logits = _logits_at(model, inputs, inner, places)
    else:
        logits = reduce_logits(inner, inputs, places, reduce)
    if clean_cache is not None:
        clean_cache.crop(packed.clean_length - packed.input_ids.shape[1])
    return logits


def _logits_at(
    model: torch.nn.Module, inputs: dict[str, Any], base_model: PreTrainedModel, places: torch.Tensor
) -> torch.Tensor:
    """
    Logits of some places only: what goes into the output embeddings is cut to them on the way.

    transformers has `logits_to_keep`, which keeps the same columns of every row. What models do to logits after their
    output embeddings (scaling, capping) is done to each element, so it does not matter that there are fewer of them.
    """
    was_cut = False

    def keep_places(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        nonlocal was_cut
        hidden_states, *others = arguments
        was_cut = hidden_states.shape[:2] == inputs["input_ids"].shape
        return (hidden_states.flatten(0, 1)[places.to(hidden_states.device)][None], *others) if was_cut else arguments

    output_embeddings: Any = base_model.get_output_embeddings()
    handle = None if output_embeddings is None else output_embeddings.register_forward_pre_hook(keep_places)
    try:
        logits = model(**inputs).logits
    finally:
        if handle is not None:
            handle.remove()
    return logits[0] if was_cut else logits.flatten(0, 1)[places.to(logits.device)]


def reduce_logits(
    model: PreTrainedModel, inputs: dict[str, Any], places: torch.Tensor, reduce: _Reduce
) -> list[torch.Tensor]:
    """
    What `reduce` makes of the logits of some places, `[num_places, vocab_size]`: tensors with an entry for each place.

    The logits are computed a part at a time, so that a batch is not limited by the vocabulary; `reduce` is given each
    part and the places' numbers in it.
    """
    most = max(_MOST_LOGITS // model.config.get_text_config().vocab_size, 1)
    if len(places) <= most or not _ends_in_head(model):
        return reduce(_logits_at(model, inputs, model, places), slice(None))
    head: Any = model.get_output_embeddings()
    hidden: list[torch.Tensor] = []

    def set_aside(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden.append(arguments[0].flatten(0, 1)[places.to(arguments[0].device)])
        return (arguments[0][:, :1], *arguments[1:])  # little is left to do for the model

    handle = head.register_forward_pre_hook(set_aside)
    try:
        model(**inputs)
    finally:
        handle.remove()
    starts = range(0, len(places), most)
    parts = [reduce(head(hidden[0][start : start + most]), slice(start, start + most)) for start in starts]
    return [torch.cat(one) for one in zip(*parts)]


def _ends_in_head(model: PreTrainedModel) -> bool:
    """Whether logits are what the output embeddings say: some models scale or cap them."""
    head: Any = model.get_output_embeddings()
    known = vars(model).get(_ENDS_IN_HEAD)
    if head is None or known is not None:
        return bool(known)
    said: list[tuple[torch.Tensor, torch.Tensor]] = []
    handle = head.register_forward_hook(lambda module, arguments, output: said.append((arguments[0], output)))
    token = torch.zeros((1, 1), dtype=torch.long, device=input_device(model))
    try:
        logits = model(token, use_cache=False).logits
    finally:
        handle.remove()
    # Some put several parts together, or leave out the output embeddings.
    is_last = len(said) == 1 and said[0][0].shape[:2] == token.shape and said[0][1].shape == logits.shape
    setattr(model, _ENDS_IN_HEAD, is_last and torch.equal(said[0][1].to(logits), logits))
    return vars(model)[_ENDS_IN_HEAD]


def forward_clean(
    model: torch.nn.Module,
    clean_ids: torch.Tensor,
    clean_mask: torch.Tensor,
    num_logits: int,
    base_model: PreTrainedModel | None = None,
    places: torch.Tensor | None = None,
    reduce: _Reduce | None = None,
) -> tuple[Any, DynamicCache]:
    """
    Run clean sequences, `[batch_size, clean_length]` and padded on the right, once for several forward passes over
    drafts after them.

    Returns logits of the last columns, `[batch_size, num_logits, vocab_size]`, or with `places` and `reduce` as for
    `packed_forward`, and keys and values of the clean sequences.
    """
    # Without the config, sliding layers keep everything: early blocks stand far before the end of the sequence.
    cache = DynamicCache()
    inner: Any = base_model or model
    inputs = {
        "input_ids": clean_ids,
        "attention_mask": clean_mask,
        "position_ids": torch.arange(clean_ids.shape[1], device=clean_ids.device).expand_as(clean_ids),
        CACHE_NAME: cache,
        "use_cache": True,
    }
    if reduce is not None and places is not None:
        return reduce_logits(inner, inputs, places, reduce), cache
    if places is not None:
        return _logits_at(model, inputs, inner, places), cache
    if "logits_to_keep" in inspect.signature(inner.forward).parameters:
        inputs["logits_to_keep"] = num_logits
    logits = model(**inputs).logits
    return logits[:, -num_logits:], cache


def copy_clean(clean_cache: DynamicCache, rows: torch.Tensor, num_columns: int) -> DynamicCache:
    """The first columns of some cached clean sequences."""
    copied = DynamicCache()
    layers: Any = clean_cache.layers
    for index, layer in enumerate(layers):
        chosen = rows.to(layer.keys.device)
        copied.update(layer.keys[chosen, :, :num_columns], layer.values[chosen, :, :num_columns], index)
    return copied
