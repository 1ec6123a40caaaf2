"""The model that `CLLMTrainer` is given, and its tokenizer, as they are to be trained."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import AutoTokenizer
from transformers.utils import find_adapter_config_file

from .._host import base_model_of
from ..blocks.drafter import NEVER_INVOKED, attach_drafter, find_drafter, is_lossless, make_drafter
from ..blocks.limits import check_adapters, check_lossless_adapter
from ..loading import load_adapter
from .config import CLLMConfig


# Of a lossless adapter where no `peft_config` says otherwise; `docs/lossless.md` has what others bring.
_RANK, _ALPHA = 64, 128


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
        _check_kind(getattr(model, "peft_config", {}).values(), args)
        return model
    from peft import PeftConfig

    if peft_config is not None:
        raise ValueError(
            f"`model` is an adapter, {model!r}, which is trained further, got a `peft_config` for a new one too. Drop "
            "it; or merge the adapter with `load_cllm(...).merge_and_unload()`, save that model, and pass its folder."
        )
    _check_kind([PeftConfig.from_pretrained(model)], args)
    options: dict[str, Any] = {"dtype": "float32", "trust_remote_code": args.trust_remote_code}
    given: Any = args.model_init_kwargs
    options |= given or {}
    args.model_init_kwargs = None  # used here; the host would warn that they are ignored
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    return load_adapter(model, is_trainable=True, **options)


def _check_kind(configs: Any, args: CLLMConfig) -> None:
    check_adapters(configs)
    for config in configs:
        if is_lossless(config) != args.lossless:
            kind = "a lossless one" if is_lossless(config) else "another one"
            raise ValueError(
                f"`lossless={args.lossless}` must fit the adapter that is trained further, got {kind}. Pass "
                f"`lossless={is_lossless(config)}`, or train a new adapter."
            )


def make_lossless_config(peft_config: Any) -> Any:
    """
    The config of an adapter that drafts.

    Args:
        peft_config (`peft.LoraConfig`, *optional*): what `CLLMTrainer` is given; by default rank 64 and
            alpha 128 on all linear layers. It is left as it was.

    Returns:
        `peft.LoraConfig`: to PEFT, an activated LoRA that nothing activates.

    Raises:
        ValueError: for an adapter of another kind than plain LoRA.
    """
    from peft import LoraConfig

    config = LoraConfig(r=_RANK, lora_alpha=_ALPHA) if peft_config is None else copy.deepcopy(peft_config)
    check_lossless_adapter(config)
    config.task_type = config.task_type or "CAUSAL_LM"
    config.target_modules = config.target_modules or "all-linear"
    config.alora_invocation_tokens = list(NEVER_INVOKED)
    return config


@contextmanager
def explained_variants() -> Iterator[None]:
    """
    Say what PEFT means where a lossless adapter is put on layers that activated LoRA cannot be put on.

    Raises:
        ValueError: for such layers.
    """
    try:
        yield
    except ValueError as error:
        if "alora_invocation_tokens" not in str(error):
            raise
        raise ValueError(
            "A lossless adapter must be on linear layers, got others in `target_modules`, such as the experts of a "
            "mixture. Name the layers of the attention instead: "
            '`LoraConfig(target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])`.'
        ) from error


def prepare_drafter(model: Any, num_masks: int, markov_rank: int) -> None:
    """
    Give a model with a new lossless adapter a drafter; one that has it keeps it.

    Args:
        model (`peft.PeftModel`): the model.
        num_masks (`int`): most tokens that are drafted after one text.
        markov_rank (`int`): rank of the Markov head.

    Raises:
        ValueError: if it has one of fewer masks.
    """
    base_model = base_model_of(model)
    drafter = find_drafter(base_model)
    if drafter is None:
        attach_drafter(base_model, make_drafter(base_model, num_masks, markov_rank))
    elif drafter.num_masks < num_masks:
        raise ValueError(
            f"The adapter that is trained further drafts at most {drafter.num_masks} tokens, got a block size of "
            f"{num_masks + 1}. Pass `block_size={drafter.num_masks + 1}` or less."
        )
    else:
        drafter.float().requires_grad_(True)


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
