"""The private names of the host libraries that nothing public replaces. `tests/test_host.py` pins each of them."""

from __future__ import annotations

from transformers import GenerationConfig, PreTrainedConfig


def mark_as_edited(generation_config: GenerationConfig) -> None:
    """
    Keep extras of a generation config through `save_pretrained` and loading.

    A generation config that was derived from `config.json` is derived again on loading, which loses everything else.
    """
    generation_config._from_model_config = None  # type: ignore[attr-defined]


def attention_implementation(config: PreTrainedConfig) -> str | None:
    """Name of the attention implementation that a model with this config runs, such as `"sdpa"`."""
    return config._attn_implementation
