"""
What single architectures and adapters cannot do, and what is refused: for decoding, trees of tokens, packed batches.

A model may hold its decoder inside of another one (a language model that reads images, an encoder-decoder pair), and
an exception of the inner model is one of the outer model too.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from .._host import PLAIN_ATTENTION, attention_implementation
from .drafter import is_lossless


# What a position says depends on more than the tokens before it, so that no later token can be guessed.
_DISAGREES = "transformers' forward pass over several tokens and its step over one do not agree in this architecture"
_OWN_MASK = "its attention has a mask of its own, of the length of the text"
_BOTH_WAYS = "it reads the text in both directions, so that a later token changes what is said at earlier ones"


@dataclass(frozen=True)
class Limits:
    """What an architecture cannot do."""

    refused: str = ""  # why several tokens cannot be verified, nor packed, in one forward pass; empty if they can
    unpacked: str = ""  # why blocks cannot be packed after their sequence, where nothing else tells
    # Whether several tokens after a cached prefix do not see all of it, or not at the right places. One at a time they
    # do.
    no_later_steps: bool = False
    counts_padding: bool = False  # whether layers group tokens by where they stand in a row, padding included
    # Whether transformers itself decodes padded rows differently with a cache and without, or in one step and in
    # several.
    no_padding: bool = False
    no_batches: bool = False  # the same with any batch
    # Whether its modules hold the recurrent state themselves, so that a second text that is decoded in between takes
    # it away.
    has_own_state: bool = False
    is_causal_as_decoder: bool = False  # whether it is causal only with `is_decoder=True` in its config


_BERT_LIKE = (
    "bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert roberta "
    "roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl xmod"
).split()

# By `model_type`: every exception of a single architecture, for decoding and for packing.
_LIMITS = {
    **dict.fromkeys(_BERT_LIKE, Limits(is_causal_as_decoder=True)),
    "blt": Limits(refused=_DISAGREES),
    "cpmant": Limits(refused=_BOTH_WAYS),
    "deepseek_v4": Limits(no_later_steps=True, no_padding=True),
    "falcon_mamba": Limits(no_later_steps=True),
    "git": Limits(no_padding=True),
    "jamba": Limits(no_later_steps=True),
    "llama4": Limits(counts_padding=True),
    "llama4_text": Limits(counts_padding=True),
    "mamba": Limits(no_later_steps=True),
    "minimax_m3_vl_text": Limits(no_padding=True),
    "nemotron_h": Limits(refused=_DISAGREES + " (one limits the time step, the other does not)"),
    "openai-gpt": Limits(unpacked=_OWN_MASK),
    "paligemma": Limits(refused="its prompt is read in both directions, and a draft after it would be too"),
    "prophetnet": Limits(refused="its decoder takes one token at a time once it has a cache"),
    "recurrent_gemma": Limits(no_later_steps=True, counts_padding=True, has_own_state=True),
    "reformer": Limits(
        refused="its attention groups the whole text, so that a later token changes what is said at earlier ones"
    ),
    "rwkv": Limits(no_batches=True),
    "xlm": Limits(refused="it says only what a mask token at the end of the text stands for, one token a pass"),
    "xlnet": Limits(refused="it says only what a dummy token at the end of the text stands for, one token a pass"),
    "zamba": Limits(no_later_steps=True),
    "zamba2": Limits(refused=_DISAGREES + " (one limits the time step, the other does not)"),
}
_REMEDY = 'Pass `decoding="autoregressive"` for it.'
# Modules of positions, by what they are called: `wpe`, `embed_positions`, `pos_emb`.
_NAMES_POSITIONS = re.compile(r"(^|[._])(wpe|pos|positions?)([._]|$)")
# Parts of a model that do not write the text.
_ENCODERS = ("encoder", "text_encoder", "question_encoder")
# Length of a table of positions, under the names that configs give it.
_POSITION_COUNTS = ("max_target_positions", "max_position_embeddings", "max_seq_len")
# Packages of torch whose layers take the scale of their input over all of its tokens.
_DYNAMICALLY_QUANTIZED = ("torch.ao.nn.quantized.dynamic", "torch.ao.nn.intrinsic.quantized.dynamic")


def limits_of(model: PreTrainedModel) -> Limits:
    """What a model cannot do, and the decoder inside of it."""
    merged = Limits()
    for config in _configs_of(model.config):
        own = _LIMITS.get(config.model_type, merged)
        merged = replace(merged, **{name: value for name, value in vars(own).items() if value})
    return merged


def why_refused(model: PreTrainedModel) -> str:
    """Why a model cannot verify several tokens, nor run a packed batch, in one forward pass."""
    limits, decoder = limits_of(model), model.config.get_text_config(decoder=True)
    if limits.refused:
        return limits.refused
    if getattr(decoder, "use_bidirectional_attention", None) in (True, "all"):
        return f"with `use_bidirectional_attention` {_BOTH_WAYS}"
    if limits.is_causal_as_decoder and not getattr(decoder, "is_decoder", True):
        return f"with `is_decoder=False` {_BOTH_WAYS}. Load it with `is_decoder=True`"
    if any(type(module).__module__.startswith(_DYNAMICALLY_QUANTIZED) for module in model.modules()):
        return (
            "its layers are quantized dynamically, by a scale over all tokens of a forward pass, so that a later "
            "token changes what is said at earlier ones. Quantize the weights alone"
        )
    return ""


def needs_same_length(model: PreTrainedModel) -> bool:
    """
    Whether the rows of a batch must stay at equal lengths.

    A model that takes no positions counts cached tokens to find them, and padding on the left would shift its count.
    """
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    limits = limits_of(model)
    # Rows of different lengths are padded, be it by the user or by the loop.
    return not takes_positions or limits.counts_padding or limits.no_padding


def count_positions(model: PreTrainedModel) -> int | None:
    """How many positions a model has, where it has a table of them, learned or fixed."""
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "rope_parameters", None) or getattr(config, "rope_theta", None):
        return None
    counts = [getattr(config, name, None) for name in _POSITION_COUNTS]
    found = [count for count in counts if isinstance(count, int) and count > 0]
    if found:
        return found[0]
    # Configs of remote code have names of their own.
    tables = [module for name, module in model.named_modules() if _NAMES_POSITIONS.search(name)]
    return min((table.num_embeddings for table in tables if isinstance(table, torch.nn.Embedding)), default=None)


def check_room(model: PreTrainedModel, prompt_length: int, max_new_tokens: int) -> None:
    """Refuse a prompt and a response that are longer than a model's table of positions, where it has one."""
    positions = count_positions(model)
    if positions is not None and prompt_length + max_new_tokens > positions:
        raise ValueError(
            f"A prompt and `max_new_tokens` must fit into the {positions} positions of the model, got {prompt_length} "
            f"and {max_new_tokens} tokens. Shorten one of them."
        )


def _configs_of(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for name, part in vars(config).items():
        if isinstance(part, PreTrainedConfig) and name not in _ENCODERS:
            yield from _configs_of(part)


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
            f"after which {_DISAGREES}, got {num_positions}. Lower `max_new_tokens` or pass "
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
    if limits_of(model).no_later_steps:
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
