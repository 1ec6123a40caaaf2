"""Random weights in the sizes of real models: their forward passes cost the same, and nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, PreTrainedConfig, Qwen2Config


_COMMON: dict[str, Any] = {
    "tie_word_embeddings": True,
    "max_position_embeddings": 4096,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
# 3.9, 29.9, 138 and 494 million parameters, embeddings counted once.
SHAPES: dict[str, dict[str, int]] = {
    "4m": dict(zip(_SIZES, (256, 4, 4, 768, 2048))),
    "30m": dict(zip(_SIZES, (512, 8, 8, 1408, 8192))),
    # The sizes of GPT-2 small, with the gated layers of Llama.
    "125m": dict(zip(_SIZES, (768, 12, 12, 3072, 32000))),
    # Qwen2.5-0.5B.
    "0.5b": {**dict(zip(_SIZES, (896, 24, 14, 4864, 151936))), "num_key_value_heads": 2},
}
# Layers at their initial scale hardly change the embedding, and the text repeats itself, which drafts would guess.
# Larger ones make it as good as random: a draft is not accepted but by chance.
_SCALE = 4.0


def shape_config(shape: str) -> PreTrainedConfig:
    kind: Any = Qwen2Config if shape == "0.5b" else LlamaConfig
    return kind(**SHAPES[shape], **_COMMON)


def make_random_model(shape: str, seed: int, dtype: str, device: torch.device) -> Any:
    """Build a model of a shape with random weights, in evaluation mode, whose text never ends by itself."""
    if dtype == "auto":
        dtype = "float32" if device.type == "cpu" else "bfloat16"
    config = shape_config(shape)
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name:
                parameter.mul_(_SCALE)
    model.generation_config = GenerationConfig(pad_token_id=0)
    return model.eval()


def random_prompts(vocab_size: int, count: int, length: int, seed: int) -> list[list[int]]:
    """Draw prompts of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (count, length), generator=generator).tolist()
