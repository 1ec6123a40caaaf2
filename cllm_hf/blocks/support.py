"""Which models, inputs and positions are refused, for decoding, trees of tokens and packed batches."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from transformers import PreTrainedModel

from .._host import PLAIN_ATTENTION, attention_implementation
from .drafter import is_lossless
from .limits import (
    DISAGREES,
    forgets_between_steps,
    limits_of,
    why_refused,
)


_REMEDY = 'Pass `decoding="autoregressive"` for it.'


def check_model(model: PreTrainedModel, batch_size: int, is_padded: bool) -> None:
    """Refuse models that cannot decode several tokens per forward pass."""
    reason = why_refused(model)
    if reason:
        raise ValueError(f'`decoding="jacobi"` does not support {type(model).__name__}: {reason}. {_REMEDY}')
    limits = limits_of(model)
    # Rows of an encoder-decoder model move on together, and nothing is padded.
    takes_mask = model.config.is_encoder_decoder or "attention_mask" in inspect.signature(model.forward).parameters
    if batch_size > 1 and (not takes_mask or limits.no_batches):
        raise ValueError(
            f"{type(model).__name__} does not make use of an `attention_mask`, so that its rows must be decoded one "
            f"by one, got a batch of {batch_size}. {_REMEDY}"
        )
    if is_padded and limits.no_padding:
        raise ValueError(
            f"{type(model).__name__} does not decode padded rows the same way in one step and in several, got an "
            f"`attention_mask` with zeros. Decode rows of different lengths one by one. {_REMEDY}"
        )


def check_model_inputs(model: PreTrainedModel, others: dict[str, Any]) -> None:
    """Refuse inputs that would be misaligned after the prefill."""
    unknown = [
        name for name, value in others.items() if isinstance(value, (torch.Tensor, dict, list, tuple)) and len(value)
    ]
    if unknown and not model.config.is_encoder_decoder:
        raise ValueError(f'`decoding="jacobi"` does not support the model input `{unknown[0]}` yet. {_REMEDY}')


def check_embeds(model: PreTrainedModel, embeds: torch.Tensor | None, is_remembered: bool) -> None:
    """Refuse a prompt of embeddings that would have to be fed again in every forward pass."""
    if embeds is not None and not is_remembered:
        raise ValueError(
            f'`decoding="jacobi"` feeds the whole text to {type(model).__name__} in every forward pass, got a prompt '
            f"of `inputs_embeds`. Pass `input_ids`. {_REMEDY}"
        )


def check_positions(model: PreTrainedModel, num_positions: int) -> None:
    """
    Refuse positions at which a forward pass over several tokens says something else than a step over one.

    Some rotations depend on how far a forward pass reaches, and so on the draft.
    """
    config = model.config.get_text_config(decoder=True)
    if config.model_type == "moshi" and num_positions > config.sliding_window:
        raise ValueError(
            f'`decoding="jacobi"` supports {type(model).__name__} up to its window of {config.sliding_window} tokens, '
            f"after which {DISAGREES}, got {num_positions}. Lower `max_new_tokens` or pass "
            '`decoding="autoregressive"`.'
        )
    parameters = getattr(config, "rope_parameters", None) or {}
    for entry in [parameters, *(value for value in parameters.values() if isinstance(value, dict))]:
        if entry.get("rope_type") in ("dynamic", "longrope"):
            original = entry.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", config.max_position_embeddings
            )
            if num_positions > original:
                raise ValueError(
                    f'`decoding="jacobi"` supports rotary embeddings of type {entry["rope_type"]} up to {original} '
                    f'positions, got {num_positions}. Lower `max_new_tokens` or pass `decoding="autoregressive"`.'
                )


def check_trees(model: PreTrainedModel, counts_columns: bool) -> None:
    """Check that a model can verify a tree of tokens in one forward pass."""
    reason = ""
    try:
        check_packable(model)
    except ValueError as error:
        reason = str(error)
    if forgets_between_steps(model):
        reason = "It does not see all of what it has cached when several tokens follow."
    elif counts_columns:
        reason = reason or "It finds positions by counting columns."
    if reason:
        raise ValueError(
            f"{type(model).__name__} does not take a tree of tokens in one forward pass, as candidates and lossless "
            f'adapters need it. {reason} Or drop what asks for it (`jacobi_candidates`, `decoding="lossless"`).'
        )


def check_packable(model: PreTrainedModel) -> None:
    """Check that a model can run packed batches."""
    config = model.config.get_text_config()
    name = type(model).__name__
    reason = why_refused(model) or limits_of(model).unpacked
    if reason:
        raise ValueError(
            f"Packed forward passes do not support {name}: {reason}. Use another model, "
            "such as Llama, Qwen, Gemma, GPT-2 or GPT-NeoX."
        )
    if "position_ids" not in inspect.signature(model.forward).parameters or getattr(config, "alibi", False):
        raise ValueError(
            f"{name} finds positions by itself, so that blocks cannot be packed after their sequence. Use a model "
            "whose `forward` takes `position_ids`, such as Llama, Qwen, Gemma, GPT-2 or GPT-NeoX."
        )
    check_adapters(getattr(model, "peft_config", {}).values())
    others = set(getattr(config, "layer_types", None) or ()) - PLAIN_ATTENTION
    if "local" in (getattr(config, "attention_layers", None) or ()):
        others.add("local")  # GPT-Neo's windows count columns
    if model.config.is_encoder_decoder or others:
        kind = "an encoder-decoder model" if model.config.is_encoder_decoder else f"layers of type {sorted(others)}"
        raise ValueError(f"Packed forward passes need a decoder with full or sliding attention, got {kind} in {name}.")
    implementation = attention_implementation(config) or ""
    if implementation not in ("sdpa", "eager", "flex_attention"):
        raise ValueError(
            f"Packed forward passes need attention that takes a mask, got `attn_implementation={implementation!r}`. "
            'Call `model.set_attn_implementation("sdpa")` first.'
        )


# By `peft_type`: adapters of which a token's part depends on more than the tokens before it, or on what no batch has.
_ADAPTERS = {
    "LILY": "they weigh their experts by the mean over all tokens of a forward pass",
    "POLY": "they ask for `task_ids` in every forward pass",
}


def why_adapter_refused(config: Any) -> str:
    """Why several tokens after a text, or packed blocks, cannot be run with an adapter in one forward pass."""
    if is_lossless(config):
        return ""  # acts on the rows of a drafter alone
    if getattr(config, "is_prompt_learning", False):
        return "it is prompt or prefix tuning, whose tokens are in no prompt"
    if getattr(config, "alora_invocation_tokens", None):
        return "activated LoRA counts from the end of the sequence"
    return _ADAPTERS.get(getattr(config.peft_type, "value", config.peft_type), "")


def check_adapters(configs: Iterable[Any]) -> None:
    """Check that packed forward passes can run adapters."""
    for config in configs:
        reason = why_adapter_refused(config)
        if reason:
            kind = getattr(config.peft_type, "value", config.peft_type)
            raise ValueError(
                f"Packed forward passes, which collect and train, do not support adapters of the kind {kind}: "
                f"{reason}. Use an adapter in the layers, such as plain LoRA."
            )


# What a `LoraConfig` may ask for beside low-rank parts of linear layers, which the gate of a lossless adapter would
# not see, and what makes such parts depend on more than their own row.
_BESIDE_LORA = (
    "use_dora use_qalora use_bdlora arrow_config velora_config monteclora_config kasa_config corda_config "
    "modules_to_save trainable_token_indices target_parameters layer_replication lora_bias alora_invocation_tokens "
    "megatron_config"
).split()


def check_lossless_adapter(config: Any) -> None:
    """Check that an adapter can be gated by rows."""
    kind = getattr(config.peft_type, "value", config.peft_type)
    extras = [name for name in _BESIDE_LORA if getattr(config, name, None)]
    if kind == "LORA" and getattr(config, "bias", "none") != "none":
        extras.append("bias")
    if kind != "LORA" or extras:
        got = f"`{extras[0]}={getattr(config, extras[0])!r}`" if extras else f"an adapter of the kind {kind}"
        raise ValueError(
            f"A lossless adapter must be plain LoRA on linear layers, which is switched off row by row, got {got}. "
            "Pass a `LoraConfig` without it."
        )
