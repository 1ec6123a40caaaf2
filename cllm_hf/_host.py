"""
Small dealings with the host libraries that several modules share.

The private names that nothing public replaces stand here and nowhere else; `tests/test_host.py` pins each of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.generation import GenerateDecoderOnlyOutput


# The name of the key/value cache among the inputs of a model and in what `generate` returns, which transformers 5.24
# has changed.
CACHE_NAME = "cache" if "cache" in inspect.signature(GenerateDecoderOnlyOutput).parameters else "past_key_values"
# All names that the caches of models have or have had.
CACHE_NAMES = tuple(dict.fromkeys((CACHE_NAME, "past_key_values", "cache_params")))
# Layer types whose masks this project knows; transformers names others for chunked, linear and sparse attention.
PLAIN_ATTENTION = {"full_attention", "sliding_attention"}


def mark_as_edited(generation_config: GenerationConfig) -> None:
    """
    Keep extras of a generation config through `save_pretrained` and loading.

    A generation config that was derived from `config.json` is derived again on loading, which loses everything else.
    """
    generation_config._from_model_config = None


def attention_implementation(config: PreTrainedConfig) -> str | None:
    """Name of the attention implementation that a model with this config runs, such as `"sdpa"`."""
    return config._attn_implementation


def compiles_whole(model: PreTrainedModel) -> bool:
    """Whether transformers says that this architecture compiles into one graph."""
    return model._can_compile_fullgraph


def has_own_loop(model: PreTrainedModel) -> bool:
    """Whether a model decodes in a way of its own, which a `custom_generate` callable would go around."""
    return any(getattr(type(model), name) is not getattr(GenerationMixin, name) for name in ("_sample", "_prefill"))


def base_model_of(model: Any) -> PreTrainedModel:
    """The transformers model inside a `peft.PeftModel`, with the adapter's layers in it; any other model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def input_device(model: PreTrainedModel) -> torch.device:
    """Where the inputs of a model go: the device of its embeddings, which may lie elsewhere than its other layers."""
    embeddings: Any = model.get_input_embeddings()
    device = embeddings.weight.device
    if device.type != "meta":
        return device
    # Offloaded by accelerate, which brings the weights where its hook says for the time of a forward pass.
    return torch.device(embeddings._hf_hook.execution_device)


def count_embeddings(model: PreTrainedModel) -> int:
    """How many tokens a model has embeddings for, with an adapter on them or without."""
    # PEFT's layers and wrappers do not name it, but what is in them does.
    sizes = (getattr(module, "num_embeddings", None) for module in model.get_input_embeddings().modules())
    return next((size for size in sizes if size is not None), model.config.get_text_config().vocab_size)


def plain_positions(model: Any, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """
    The positions of whole rows as `generate` passes them, from 0 on, for a plain forward pass: left to themselves some
    models, such as RoBERTa, count from elsewhere.
    """
    if "position_ids" not in inspect.signature(base_model_of(model).forward).parameters:
        return {}
    return {"position_ids": torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)}


def mixes_adapters(model: PreTrainedModel) -> bool:
    """Whether `adapter_names` are in force, which PEFT gives to each row by hooks on the adapter's layers."""
    layers = (layer for _, layer in adapter_layers(model))
    return any(_tells(hook, "adapter_names") for layer in layers for hook in layer._forward_pre_hooks.values())


@contextmanager
def leaving_no_hooks(model: PreTrainedModel) -> Iterator[None]:
    """
    Take out the hooks by which `PeftModel.generate` tells layers what a call is about, if the block fails.

    PEFT itself leaves them, so that they would go on in every later call.
    """
    try:
        yield
    except BaseException:
        for _, layer in adapter_layers(model):
            hooks = layer._forward_pre_hooks
            for number in [number for number, hook in hooks.items() if _tells(hook, "adapter_names", "alora_offsets")]:
                del hooks[number]
        raise


def _tells(hook: Any, *names: str) -> bool:
    """Whether a hook of PEFT tells a layer one of these."""
    return any(name in getattr(hook, "keywords", ()) for name in names)


@contextmanager
def without_alora_hooks(layers: Iterable[Any]) -> Iterator[None]:
    """
    Set aside hooks by which `PeftModel.generate` tells layers where an activated LoRA begins, until the block ends.

    They have nothing to say to a lossless adapter, and modules with hooks take longer to be called.
    """
    set_aside = []
    for layer in layers:
        hooks = layer._forward_pre_hooks
        for number in [number for number, hook in hooks.items() if _tells(hook, "alora_offsets")]:
            set_aside.append((hooks, number, hooks.pop(number)))
    try:
        yield
    finally:
        for hooks, number, hook in set_aside:
            hooks[number] = hook


def adapter_layers(model: PreTrainedModel) -> Iterator[tuple[str, Any]]:
    """The layers of a model, not wrapped, that PEFT has put adapters into, each with its name."""
    for name, module in model.named_modules():
        # Every transformers model has methods of the same names, and may have hooks of its own. Of the class, since a
        # module takes its time to say that it does not have an attribute.
        kind = type(module)
        if hasattr(kind, "active_adapters") and hasattr(kind, "disable_adapters"):
            if not isinstance(module, PreTrainedModel):
                yield name, module


def set_checkpointing(model: PreTrainedModel, is_on: bool) -> None:
    """Whether a model in training keeps its activations or computes them anew; v6 of transformers has new names."""
    action = "enable" if is_on else "disable"
    method = getattr(model, f"activation_checkpointing_{action}", None)
    method = method or getattr(model, f"gradient_checkpointing_{action}")
    method(*([{"use_reentrant": False}] if is_on else []))


def has_hooks(module: Any) -> bool:
    """Whether anything else than its `forward` runs when a module is called."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)
