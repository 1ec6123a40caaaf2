"""The model that `CLLMTrainer` is given, and its tokenizer, as they are to be trained."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer
from transformers.utils import find_adapter_config_file

from .._host import base_model_of
from ..blocks.support import check_adapters
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
        ValueError: for a `peft_config` beside an adapter, an adapter that does not fit its base model, or one of a
            kind that cannot be trained here.
    """
    if peft_config is not None:
        check_adapters([peft_config])
    if not isinstance(model, str) or find_adapter_config_file(model) is None:
        check_adapters(getattr(model, "peft_config", {}).values())
        return model
    from peft import PeftConfig

    if peft_config is not None:
        raise ValueError(
            f"`model` is an adapter, {model!r}, which is trained further, got a `peft_config` for a new one too. Drop "
            "it; or merge the adapter with `load_cllm(...).merge_and_unload()`, save that model, and pass its folder."
        )
    check_adapters([PeftConfig.from_pretrained(model)])
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


def set_pad_token(model: Any, processing_class: Any, pad_token: str | None) -> None:
    """
    Set the padding token of tokenizer, config and generation config, as `trl.SFTTrainer` does for its own collator.

    Args:
        model (`transformers.PreTrainedModel` or `peft.PeftModel`): the model.
        processing_class (`transformers.PreTrainedTokenizerBase` or `transformers.ProcessorMixin`): its tokenizer.
        pad_token (`str`, *optional*): the token; by default all stays as it is.

    Raises:
        ValueError: if the tokenizer does not have it.
    """
    if pad_token is None:
        return
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if pad_token not in tokenizer.get_vocab():
        raise ValueError(
            f"`pad_token` must be a token of the tokenizer, got {pad_token!r}, which is not in its vocabulary of "
            f"{len(tokenizer)}. Choose one that is, such as {tokenizer.eos_token!r}, or add it and resize the model's "
            "embeddings."
        )
    tokenizer.pad_token = pad_token
    base_model = base_model_of(model)
    base_model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    for owner in (base_model, model):  # an adapter may have a generation config of its own
        owner.generation_config.pad_token_id = tokenizer.pad_token_id
