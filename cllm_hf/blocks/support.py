"""What is known of single architectures: which are refused, and which need more than the usual care."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from .._host import PLAIN_ATTENTION, attention_implementation


_REMEDY = 'Pass `decoding="autoregressive"` for it.'
# What a position says depends on more than the tokens before it, so that no later token can be guessed.
_DISAGREES = "transformers' forward pass over several tokens and its step over one do not agree in this architecture"
_OWN_MASK = "its attention has a mask of its own, of the length of the text"


@dataclass(frozen=True)
class _Limits:
    """
    What an architecture cannot do.

    Attributes:
        refused (`str`): why several tokens cannot be verified, nor packed, in one forward pass; empty if they can.
        unpacked (`str`): why blocks cannot be packed after their sequence, where nothing else tells.
        no_later_steps (`bool`): whether several tokens after a cached prefix do not see all of it, or not at the right
            places. One at a time they do.
        counts_padding (`bool`): whether layers group tokens by where they stand in a row, padding included.
        no_padding (`bool`): whether transformers itself decodes padded rows differently with a cache and without, or
            in one step and in several.
        no_batches (`bool`): the same with any batch.
    """

    refused: str = ""
    unpacked: str = ""
    no_later_steps: bool = False
    counts_padding: bool = False
    no_padding: bool = False
    no_batches: bool = False


# By `model_type`: every exception of a single architecture, for decoding and for packing.
_LIMITS = {
    "blt": _Limits(refused=_DISAGREES),
    "cpmant": _Limits(
        refused="it reads the text in both directions, so that a later token changes what is said at earlier ones"
    ),
    "deepseek_v4": _Limits(no_later_steps=True, no_padding=True),
    "falcon_mamba": _Limits(no_later_steps=True),
    "git": _Limits(no_padding=True),
    "jamba": _Limits(no_later_steps=True),
    "llama4": _Limits(counts_padding=True),
    "llama4_text": _Limits(counts_padding=True),
    "mamba": _Limits(no_later_steps=True),
    "minimax_m3_vl_text": _Limits(no_padding=True),
    "nemotron_h": _Limits(refused=_DISAGREES + " (one limits the time step, the other does not)"),
    "openai-gpt": _Limits(unpacked=_OWN_MASK),
    "prophetnet": _Limits(refused="its decoder takes one token at a time once it has a cache"),
    "recurrent_gemma": _Limits(no_later_steps=True, counts_padding=True),
    "reformer": _Limits(
        refused="its attention groups the whole text, so that a later token changes what is said at earlier ones"
    ),
    "rwkv": _Limits(no_batches=True),
    "xlm": _Limits(refused="it says only what a mask token at the end of the text stands for, one token a pass"),
    "xlnet": _Limits(refused="it says only what a dummy token at the end of the text stands for, one token a pass"),
    "zamba": _Limits(no_later_steps=True),
    "zamba2": _Limits(refused=_DISAGREES + " (one limits the time step, the other does not)"),
}
_NO_LIMITS = _Limits()


def _limits_of(model: PreTrainedModel) -> _Limits:
    return _LIMITS.get(model.config.model_type, _NO_LIMITS)


def forgets_between_steps(model: PreTrainedModel) -> bool:
    """
    Whether a forward over several tokens loses sight of what an earlier one has cached.

    Args:
        model (`transformers.PreTrainedModel`): the model to decode.

    Returns:
        `bool`.
    """
    return _limits_of(model).no_later_steps


def needs_same_length(model: PreTrainedModel) -> bool:
    """
    Whether the rows of a batch must stay at equal lengths.

    A model that takes no positions counts cached tokens to find them, and padding on the left would shift its count.

    Args:
        model (`transformers.PreTrainedModel`): the model to decode.

    Returns:
        `bool`.
    """
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    limits = _limits_of(model)
    # Rows of different lengths are padded, be it by the user or by the loop.
    return not takes_positions or limits.counts_padding or limits.no_padding


def check_model(model: PreTrainedModel, batch_size: int, is_padded: bool) -> None:
    """
    Refuse models that cannot decode several tokens a forward.

    Args:
        model (`transformers.PreTrainedModel`): the model to decode.
        batch_size (`int`): number of rows.
        is_padded (`bool`): whether some row has padding.

    Raises:
        ValueError: for an architecture whose output at a position depends on more than the tokens before it, and for
            a batch where the model, or the host with this model, cannot do with one.
    """
    limits = _limits_of(model)
    if limits.refused:
        raise ValueError(f'`decoding="jacobi"` does not support {type(model).__name__}: {limits.refused}. {_REMEDY}')
    takes_mask = "attention_mask" in inspect.signature(model.forward).parameters
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


def check_model_inputs(model: PreTrainedModel, extended: dict[str, Any], others: dict[str, Any]) -> None:
    """
    Refuse inputs that would be misaligned after the prefill.

    Args:
        model (`transformers.PreTrainedModel`): the model to decode.
        extended (`dict`): inputs that grow with the sequence.
        others (`dict`): the other inputs, as the host prepared them.

    Raises:
        ValueError: for positions of more than one dimension, and for what belongs to the prompt alone (images and the
            like).
    """
    positions = extended.get("position_ids")
    if positions is not None and positions.dim() != 2:
        raise ValueError(
            f'`decoding="jacobi"` needs `position_ids` of two dimensions, got shape {tuple(positions.shape)}. '
            + _REMEDY
        )
    unknown = [
        name for name, value in others.items() if isinstance(value, (torch.Tensor, dict, list, tuple)) and len(value)
    ]
    if unknown and not model.config.is_encoder_decoder:
        raise ValueError(f'`decoding="jacobi"` does not support the model input `{unknown[0]}` yet. {_REMEDY}')


def check_embeds(model: PreTrainedModel, embeds: torch.Tensor | None, is_remembered: bool) -> None:
    """
    Refuse a prompt of embeddings that would have to be fed again in every forward.

    Args:
        model (`transformers.PreTrainedModel`): the model to decode.
        embeds (`torch.Tensor`, *optional*): the prompt, if it comes as embeddings.
        is_remembered (`bool`): whether the model has a cache that holds it.

    Raises:
        ValueError: if it has none.
    """
    if embeds is not None and not is_remembered:
        raise ValueError(
            f'`decoding="jacobi"` feeds the whole text to {type(model).__name__} in every forward, got a prompt of '
            f"`inputs_embeds`. Pass `input_ids`. {_REMEDY}"
        )


def check_positions(model: PreTrainedModel, num_positions: int) -> None:
    """
    Refuse positions at which a forward over several tokens says something else than a step over one.

    Some rotations depend on how far a forward reaches, and so on the draft.

    Args:
        model (`transformers.PreTrainedModel`): the model to decode.
        num_positions (`int`): positions that prompt and response may take.

    Raises:
        ValueError: for dynamic and long rotary embeddings beyond the length that the model was first trained for, and
            for Moshi beyond its window.
    """
    config = model.config.get_text_config(decoder=True)
    if config.model_type == "moshi" and num_positions > config.sliding_window:
        raise ValueError(
            f'`decoding="jacobi"` supports {type(model).__name__} up to its window of {config.sliding_window} tokens, '
            f"behind which {_DISAGREES}, got {num_positions}. Lower `max_new_tokens` or pass "
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


def check_trees(model: PreTrainedModel) -> None:
    """
    Check that a model can verify a tree of tokens in one forward pass.

    Args:
        model (`transformers.PreTrainedModel`): the model to decode.

    Raises:
        ValueError: for models that take no mask of pairs or no positions, see `check_packable`, and for those that
            keep something else than keys and values of each token.
    """
    reason = ""
    try:
        check_packable(model)
    except ValueError as error:
        reason = str(error)
    if forgets_between_steps(model):
        reason = "It does not see all of what it has cached when several tokens follow."
    elif needs_same_length(model):
        reason = reason or "It finds positions by counting columns."
    if reason:
        raise ValueError(
            f"{type(model).__name__} does not take a tree of candidates beside the draft. {reason} Or drop what asks "
            "for it, such as `jacobi_candidates`."
        )


def check_packable(model: PreTrainedModel) -> None:
    """
    Check that a model can run packed batches.

    Args:
        model (`transformers.PreTrainedModel`): the model, not wrapped.

    Raises:
        ValueError: for models that take no positions, that find positions by the column (ALiBi), whose layers are not
            full or sliding attention, or whose attention implementation takes no mask (flash attention).
    """
    config = model.config.get_text_config()
    name = type(model).__name__
    limits = _limits_of(model)
    if limits.refused or limits.unpacked:
        raise ValueError(
            f"Packed forward passes do not support {name}: {limits.refused or limits.unpacked}. Use another model, "
            "such as Llama, Qwen, Gemma, GPT-2 or GPT-NeoX."
        )
    if "position_ids" not in inspect.signature(model.forward).parameters or getattr(config, "alibi", False):
        raise ValueError(
            f"{name} finds positions by itself, so that blocks cannot be packed behind their sequence. Use a model "
            "whose `forward` takes `position_ids`, such as Llama, Qwen, Gemma, GPT-2 or GPT-NeoX."
        )
    check_adapters(getattr(model, "peft_config", {}).values())
    others = set(getattr(config, "layer_types", None) or ()) - PLAIN_ATTENTION
    if "local" in (getattr(config, "attention_layers", None) or ()):
        others.add("local")  # GPT-Neo's windows count columns
    if model.config.is_encoder_decoder or others:
        kind = "an encoder-decoder model" if model.config.is_encoder_decoder else f"layers of type {sorted(others)}"
        raise ValueError(f"Packed forwards need a decoder with full or sliding attention, got {kind} in {name}.")
    implementation = attention_implementation(config) or ""
    if implementation not in ("sdpa", "eager", "flex_attention"):
        raise ValueError(
            f"Packed forwards need attention that takes a mask, got `attn_implementation={implementation!r}`. Call "
            '`model.set_attn_implementation("sdpa")` first.'
        )


# By `peft_type`: adapters of which a token's part depends on more than the tokens before it, or on what no batch has.
_ADAPTERS = {
    "LILY": "they weigh their experts by the mean over all tokens of a forward pass",
    "POLY": "they ask for `task_ids` in every forward pass",
}


def check_adapters(configs: Iterable[Any]) -> None:
    """
    Check that packed forward passes can run adapters.

    Args:
        configs (`Iterable[peft.PeftConfig]`): of the adapters.

    Raises:
        ValueError: for prompt-learning adapters, activated LoRA, and what is not a function of each token alone.
    """
    for config in configs:
        kind = getattr(config.peft_type, "value", config.peft_type)
        reason = _ADAPTERS.get(kind, "")
        if getattr(config, "is_prompt_learning", False):
            reason = "it is prompt or prefix tuning, whose tokens are in no prompt"
        elif getattr(config, "alora_invocation_tokens", None):
            reason = "activated LoRA counts from the end of the sequence"
        if reason:
            raise ValueError(
                f"Packed forward passes, which collect and train, do not support adapters of the kind {kind}: "
                f"{reason}. Use an adapter in the layers, such as plain LoRA."
            )
