"""What `generate` can be asked for, and several tokens a forward pass cannot do."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module

from ._host import has_own_loop, mixes_adapters
from .blocks.drafter import is_lossless
from .blocks.limits import limits_of, why_adapter_refused
from .options import JACOBI, option_of


# Model inputs that grow with the text, or are not handed to the model at all.
_TEXT_INPUTS = (
    "inputs input_ids inputs_embeds attention_mask position_ids token_type_ids negative_prompt_ids "
    "negative_prompt_attention_mask"
).split()
_GREEDY = 'pass `decoding="autoregressive"`'


def check_supported(
    model: PreTrainedModel, call: dict[str, Any], configs: list[GenerationConfig], decoding: str = JACOBI
) -> None:
    """Check that nothing is asked for that decoding several tokens a forward pass would have to ignore."""

    def option(name: str) -> Any:
        return option_of(call, configs, name)

    def refuse(what: str, got: Any, remedy: str = f"drop it or {_GREEDY}") -> None:
        raise ValueError(f'`decoding="{decoding}"` does not support {what}, got {got}. To go on, {remedy}.')

    if call.get("custom_generate") is not None:
        refuse("`custom_generate`", repr(call["custom_generate"]), "pass only one of the two")
    if has_own_loop(model):
        refuse("models with a decoding loop of their own", type(model).__name__, _GREEDY)
    if (option("num_beams") or 1) > 1:
        refuse("beam search", f"num_beams={option('num_beams')}", f"pass `num_beams=1` or {_GREEDY}")
    for name in ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit"):
        if option(name) is not None:
            refuse(f"`{name}`, which is another way to decode several tokens per forward pass", "both")
    for name in ("penalty_alpha", "dola_layers", "prefill_chunk_size", "token_healing"):
        if option(name):
            refuse(f"`{name}`", repr(option(name)))
    for name in ("output_attentions", "output_hidden_states"):
        if option(name):
            refuse(f"`{name}` yet", f"True{_asked_by(model)}")
    for name, value in call.items():
        if not model.config.is_encoder_decoder and _is_read_with_prompt(name, value, configs[-1]):
            refuse(f"the model input `{name}` yet", "one")
    scale = option("guidance_scale")
    if limits_of(model).has_own_state and (scale or 1) != 1:
        refuse(f"`guidance_scale` with {type(model).__name__}, whose one state two texts would share", scale)
    if option("cache_implementation") not in (None, "dynamic", "hybrid", "static"):
        refuse("this cache yet", f"cache_implementation={option('cache_implementation')!r}")
    if _runs_in_step(call.get("synced_gpus"), model):
        refuse("generation that keeps processes in step (`synced_gpus`, ZeRO-3, FSDP) yet", "such a run", _GREEDY)
    adapters = [config for config in _peft_configs(model) if not is_lossless(config)]
    for adapter in adapters:
        reason = why_adapter_refused(adapter)
        if reason:
            refuse("this adapter", f"one that cannot be run over a draft: {reason}", f"use plain LoRA or {_GREEDY}")
    if adapters and mixes_adapters(model):
        refuse("several adapters in a batch yet", "`adapter_names`", f"set one adapter for the batch or {_GREEDY}")


def _asked_by(model: Any) -> str:
    """Who may have set an option that the caller did not."""
    if type(model).generate is GenerationMixin.generate:
        return ""
    return (
        f" (`{type(model).__name__}.generate` sets it by itself for some of its own options, such as "
        "`return_token_timestamps` of Whisper)"
    )


def _is_read_with_prompt(name: str, value: Any, config: GenerationConfig) -> bool:
    """Whether an argument is a model input that belongs to the prompt alone, such as an image."""
    if name in _TEXT_INPUTS or hasattr(config, name):
        return False
    parts = value if isinstance(value, (list, tuple)) else [value]
    return any(isinstance(part, torch.Tensor) and bool(part.any()) for part in parts)


def _runs_in_step(synced_gpus: bool | None, model: PreTrainedModel) -> bool:
    if synced_gpus is not None:
        return synced_gpus
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not distributed or torch.distributed.get_world_size() == 1:
        return False
    return is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model)


def _peft_configs(model: PreTrainedModel) -> list[Any]:
    # While a `PeftModel` generates, the base model's input preparation is a bound method of the `PeftModel`.
    owner = getattr(model.prepare_inputs_for_generation, "__self__", model)
    configs = getattr(owner, "peft_config", None)
    return list(configs.values()) if isinstance(configs, dict) else []
