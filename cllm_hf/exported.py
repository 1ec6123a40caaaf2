"""
Jacobi decoding for `generate`: several tokens per forward pass, and exactly those of decoding one at a time.

`export_custom_generate` copies this file, as `generate.py`, and the modules that it needs beside a saved model.
transformers calls `generate`; nothing outside these files is changed.
"""

from __future__ import annotations

import inspect
from types import FrameType
from typing import Any

from transformers import GenerationMixin

from .adapters import HUB_OPTIONS, add_drafter
from .blocks.drafter import Drafter, active_lossless_adapter, find_drafter, is_switched_off
from .integration import with_decoding
from .options import AUTO


# What the one who exports this file chooses; arguments and generation configs come first.
EXPORTED_BLOCK_SIZE = None
EXPORTED_DECODING = "jacobi"


def generate(*args: Any, model: Any, **kwargs: Any) -> Any:
    """
    `generate` of transformers with the options of Jacobi decoding.

    Args:
        args: as for `GenerationMixin.generate`, without the model.
        model (`transformers.PreTrainedModel`): bound by transformers.
        kwargs: as for `GenerationMixin.generate`, and the options of Jacobi decoding.

    Returns:
        What `GenerationMixin.generate` returns. With `return_dict_in_generate=True` it has `jacobi_stats`.

    Raises:
        ValueError: for options that Jacobi decoding does not support; the message names the way out.
    """
    # `generate(custom_generate=...)` names all arguments of `generate` here, most of them `None`.
    named = inspect.signature(GenerationMixin.generate).parameters
    kwargs = {name: value for name, value in kwargs.items() if value is not None or name not in named}
    if EXPORTED_DECODING == "lossless":
        kwargs = _with_drafter(model, kwargs, inspect.currentframe())
    if kwargs.get("custom_generate") is None:
        kwargs = _with_exported_defaults(model, args, kwargs)
    return with_decoding(type(model).generate)(model, *args, **kwargs)


def _with_drafter(model: Any, kwargs: dict[str, Any], frame: FrameType | None) -> dict[str, Any]:
    """Load the drafter of the active adapter, if that has not been done, and leave out what says where it is."""
    place = kwargs.get("lossless_adapter") or _named_place(frame)
    options = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
    name = active_lossless_adapter(model)
    if name is not None and find_drafter(model) is None and kwargs.get("decoding") != "autoregressive":
        if place is None:
            raise ValueError(
                "Lossless decoding needs the drafter that is saved beside the adapter. Pass the folder or Hub id of "
                "the adapter as `lossless_adapter`."
            )
        is_trainable = any(weight.requires_grad for key, weight in model.named_parameters() if "lora_" in key)
        add_drafter(model, name, str(place), is_trainable, **options)
    return {name: value for name, value in kwargs.items() if name not in ("lossless_adapter", *HUB_OPTIONS)}


def _named_place(frame: FrameType | None) -> str | None:
    """
    The folder or Hub id that `generate(custom_generate=...)` names. transformers runs this file without saying where
    it comes from, so that the call that names it is looked at.
    """
    for _ in range(4):  # the call stands right before this file's `generate`, or a wrapper away
        frame = frame.f_back if frame is not None else None
        place = frame.f_locals.get("custom_generate") if frame is not None else None
        if isinstance(place, str):
            return place
    return None


def _with_exported_defaults(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    config = args[1] if len(args) > 1 else kwargs.get("generation_config")

    def chosen(name: str) -> Any:
        sources = (kwargs.get(name), getattr(config, name, None), getattr(model.generation_config, name, None))
        return next((value for value in sources if value is not None), None)

    if EXPORTED_DECODING == "lossless" and is_switched_off(model):
        return kwargs  # the base model is asked for
    if chosen("decoding") is None:
        kwargs = {**kwargs, "decoding": EXPORTED_DECODING}
    is_open = EXPORTED_BLOCK_SIZE is not None and chosen("jacobi_block_size") is None
    if is_open and chosen("decoding") == EXPORTED_DECODING:
        kwargs = {**kwargs, "jacobi_block_size": _drafted(EXPORTED_BLOCK_SIZE, find_drafter(model))}
    return kwargs


def _drafted(block_size: Any, drafter: Drafter | None) -> Any:
    """A default is cut to what an adapter drafts, where a wish of the caller would be refused."""
    return block_size if drafter is None or block_size == AUTO else min(block_size, drafter.num_masks + 1)
