"""The model that `CLLMTrainer` is given, and its tokenizer, where that is the name of an adapter."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer
from transformers.utils import find_adapter_config_file

from ..loading import load_adapter
from .config import CLLMConfig


def load_target(model: Any, args: CLLMConfig, peft_config: Any, quantization_config: Any = None) -> Any:
    """
    Load an adapter that is to be trained further: its base model, with the adapter on it.

    The host loads whole models by their names, and knows no adapters.

    Args:
        model (`str` or any model): what `CLLMTrainer` is given.
        args (`CLLMConfig`): its `model_init_kwargs` go to the base model. As for whole models, weights are loaded in
            float32 unless `dtype` among them says otherwise.
        peft_config (`peft.PeftConfig`, *optional*): what `CLLMTrainer` is given.
        quantization_config (*optional*): goes to the base model.

    Returns:
        The adapter as a `peft.PeftModel` if `model` is the folder or Hub id of one; else `model` itself.

    Raises:
        OSError: if there is no such base model.
        ValueError: for a `peft_config` beside an adapter, or an adapter that does not fit its base model.
    """
    if not isinstance(model, str) or find_adapter_config_file(model) is None:
        return model
    if peft_config is not None:
        raise ValueError(
            f"`model` is an adapter, {model!r}, which is trained further, got a `peft_config` for a new one too. Drop "
            "it; or merge the adapter with `load_cllm(...).merge_and_unload()`, save that model, and pass its folder."
        )
    options: dict[str, Any] = {"dtype": "float32", "trust_remote_code": args.trust_remote_code}
    given: Any = args.model_init_kwargs
    options |= given or {}
    args.model_init_kwargs = None  # used here; the host would warn that they are ignored
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    return load_adapter(model, is_trainable=True, **options)


def load_target_tokenizer(model: Any) -> Any:
    """
    Load the tokenizer beside an adapter. The host takes that of the base model, which may have none.

    Args:
        model (`str` or any model): what `CLLMTrainer` is given.

    Returns:
        `transformers.PreTrainedTokenizerBase`, or `None` if `model` is no adapter's name, or there is none beside it.
    """
    if not isinstance(model, str) or find_adapter_config_file(model) is None:
        return None
    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError):
        return None
