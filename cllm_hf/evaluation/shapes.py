"""Random weights in the sizes of real models: their forward passes cost the same, and nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)


_COMMON: dict[str, Any] = {
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
# 3.9, 29.9, 138 and 494 million parameters, embeddings counted once.
SHAPES: dict[str, dict[str, Any]] = {
    "4m": {
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 768,
        "vocab_size": 2048,
    },
    "30m": {
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "intermediate_size": 1408,
        "vocab_size": 8192,
    },
    # The sizes of GPT-2 small, with the gated layers of Llama.
    "125m": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "vocab_size": 32000,
    },
    # Qwen2.5-0.5B.
    "0.5b": {
        "hidden_size": 896,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "intermediate_size": 4864,
        "vocab_size": 151936,
    },
}
# Layers at their initial scale hardly change the embedding, and the text repeats itself, which drafts would guess.
# Larger ones make it as good as random: a draft is not accepted but by chance.
_SCALE = 4.0


def shape_config(shape: str) -> PreTrainedConfig:
    """
    Config of a shape.

    Args:
        shape (`str`): a key of `SHAPES`.

    Returns:
        `transformers.PreTrainedConfig`.

    Raises:
        ValueError: for an unknown shape.
    """
    if shape not in SHAPES:
        raise ValueError(f"`shape` must be one of {', '.join(SHAPES)}, got {shape!r}.")
    kind: Any = Qwen2Config if shape == "0.5b" else LlamaConfig
    return kind(**SHAPES[shape], **_COMMON, max_position_embeddings=4096)


def make_random_model(shape: str, seed: int, dtype: torch.dtype, device: torch.device) -> Any:
    """
    Build a model of a shape with random weights, whose text never ends by itself.

    Args:
        shape (`str`): a key of `SHAPES`.
        seed (`int`): of the weights.
        dtype (`torch.dtype`): of the weights.
        device (`torch.device`): where to build it.

    Returns:
        `transformers.PreTrainedModel`, in evaluation mode.

    Raises:
        ValueError: for an unknown shape.
    """
    config = shape_config(shape)
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name:
                parameter.mul_(_SCALE)
    model.generation_config = GenerationConfig(pad_token_id=0)
    return model.eval()


def random_prompts(vocab_size: int, count: int, length: int, seed: int) -> list[list[int]]:
    """
    Draw prompts of random tokens.

    Args:
        vocab_size (`int`): number of tokens to draw from.
        count (`int`): number of prompts.
        length (`int`): tokens of each.
        seed (`int`): of the draw.

    Returns:
        `list[list[int]]`.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (count, length), generator=generator).tolist()


def make_number_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """
    Make a tokenizer for a model of a shape, which has no text: its words are the numbers of the tokens, as in "7 31".

    Args:
        vocab_size (`int`): number of tokens of the model.

    Returns:
        `transformers.PreTrainedTokenizerFast`, without special tokens.
    """
    tokenizer = Tokenizer(models.WordLevel({str(token): token for token in range(vocab_size)}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)
