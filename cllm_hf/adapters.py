"""The drafter of a lossless adapter, which whoever loads the adapter alone leaves in its folder."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ._host import adapter_layers
from .blocks.drafter import Drafter, attach_drafter, detach_drafter, drafters_aside, is_lossless


logger = logging.get_logger(__name__)

# Where a file of the Hub is and how to get at it: options of `from_pretrained` that go for an adapter's files too.
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
_WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def add_drafter(
    model: PreTrainedModel, adapter_name: str, folder: str, is_trainable: bool = False, **options: Any
) -> None:
    """
    Load the drafter of a lossless adapter whose layers are on a model already, not wrapped, from the adapter's folder
    or Hub id; `options` are `HUB_OPTIONS`.

    Unless it is to be trained further, adapter and drafter get the dtype of the model: PEFT makes those of 16-bit
    models float32, which decoding would only have to convert. An `OSError` if there is no drafter, a `ValueError` if
    its file is damaged, or of a later format.
    """
    attach_drafter(model, Drafter.load(folder, **options), is_trainable, adapter_name)
    if is_trainable:
        return
    for _, layer in adapter_layers(model):
        dtype = getattr(getattr(layer.get_base_layer(), "weight", None), "dtype", None)
        for parts in (getattr(layer, "lora_A", {}), getattr(layer, "lora_B", {})):
            if adapter_name in parts:
                parts[adapter_name].to(dtype if dtype in _WEIGHT_DTYPES else model.dtype)  # quantized to another one


def loading_drafters(original: Callable[..., Any]) -> Callable[..., Any]:
    """
    Make a `load_adapter` of transformers models that loads the drafter of a lossless adapter as well, from that of
    transformers, which `from_pretrained` calls for an adapter too.
    """
    signature = inspect.signature(original)

    @functools.wraps(original)
    def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        with drafters_aside(self):
            report = original(self, *args, **kwargs)
        call = signature.bind(self, *args, **kwargs).arguments
        name = call.get("adapter_name") or "default"
        if is_lossless(self.peft_config.get(name)):
            _add_drafter_of_call(self, name, call)
        return report

    return load_adapter


def _add_drafter_of_call(model: PreTrainedModel, adapter_name: str, call: dict[str, Any]) -> None:
    load_config = call.get("load_config")
    folder = call.get("peft_model_id") or getattr(load_config, "pretrained_model_name_or_path", None)
    detach_drafter(model, adapter_name)  # of an adapter whose place the new one has taken
    if folder is None:
        return  # its weights were passed; that the drafter is missing is said when it is missed
    # The second have been completed by the call, with the revision that the adapter was found at.
    given = {**(call.get("adapter_kwargs") or {}), **(getattr(load_config, "download_kwargs", None) or {})}
    options = {name: given[name] for name in HUB_OPTIONS if given.get(name) is not None}
    try:
        add_drafter(model, adapter_name, str(folder), bool(call.get("is_trainable")), **options)
    except OSError as error:  # without it, the text is the base model's all the same
        logger.warning("%s The model decodes as its base model does, one token after the other.", error)
