"""
What single architectures cannot do: one table of exceptions, for decoding, packing and training.

A model may hold its decoder inside of another one (a language model that reads images, an encoder-decoder pair), and
an exception of the inner model is one of the outer model too.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedConfig, PreTrainedModel


# What a position says depends on more than the tokens before it, so that no later token can be guessed.
DISAGREES = "transformers' forward pass over several tokens and its step over one do not agree in this architecture"
_OWN_MASK = "its attention has a mask of its own, of the length of the text"
_BOTH_WAYS = "it reads the text in both directions, so that a later token changes what is said at earlier ones"


@dataclass(frozen=True)
class Limits:
    """What an architecture cannot do."""

    refused: str = ""  # why several tokens cannot be verified, nor packed, in one forward pass; empty if they can
    unpacked: str = ""  # why blocks cannot be packed after their sequence, where nothing else tells
    # whether several tokens after a cached prefix do not see all of it, or not at the right places. One at a time they
    # do
    no_later_steps: bool = False
    counts_padding: bool = False  # whether layers group tokens by where they stand in a row, padding included
    # whether transformers itself decodes padded rows differently with a cache and without, or in one step and in
    # several
    no_padding: bool = False
    no_batches: bool = False  # the same with any batch
    # whether its modules hold the recurrent state themselves, so that a second text that is decoded in between takes
    # it away
    has_own_state: bool = False
    is_causal_as_decoder: bool = False  # whether it is causal only with `is_decoder=True` in its config


_BERT_LIKE = (
    "bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert roberta "
    "roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl xmod"
).split()

# By `model_type`: every exception of a single architecture, for decoding and for packing.
_LIMITS = {
    **dict.fromkeys(_BERT_LIKE, Limits(is_causal_as_decoder=True)),
    "blt": Limits(refused=DISAGREES),
    "cpmant": Limits(refused=_BOTH_WAYS),
    "deepseek_v4": Limits(no_later_steps=True, no_padding=True),
    "falcon_mamba": Limits(no_later_steps=True),
    "git": Limits(no_padding=True),
    "jamba": Limits(no_later_steps=True),
    "llama4": Limits(counts_padding=True),
    "llama4_text": Limits(counts_padding=True),
    "mamba": Limits(no_later_steps=True),
    "minimax_m3_vl_text": Limits(no_padding=True),
    "nemotron_h": Limits(refused=DISAGREES + " (one limits the time step, the other does not)"),
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
    "zamba2": Limits(refused=DISAGREES + " (one limits the time step, the other does not)"),
}
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


def forgets_between_steps(model: PreTrainedModel) -> bool:
    """Whether a forward pass over several tokens loses sight of what an earlier one has cached."""
    return limits_of(model).no_later_steps


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
    # Configs of remote code have names of their own.
    return found[0] if found else min(_lengths_of_tables(model), default=None)


def _lengths_of_tables(model: PreTrainedModel) -> Iterator[int]:
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding) and _NAMES_POSITIONS.search(name):
            yield module.num_embeddings


def _configs_of(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for name, part in vars(config).items():
        if isinstance(part, PreTrainedConfig) and name not in _ENCODERS:
            yield from _configs_of(part)
