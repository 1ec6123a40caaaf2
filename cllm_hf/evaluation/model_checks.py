"""What is checked before models are compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .._host import base_model_of


def check_counts(**counts: int) -> None:
    """
    Check numbers of which there must be at least one.

    Args:
        counts (`int`): by the names of their options.

    Raises:
        ValueError: for one below 1.
    """
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")


def check_models(target: Any, cllm: Any, assistant: Any) -> None:
    """
    Check that models can be compared.

    Args:
        target (`transformers.PreTrainedModel` or `peft.PeftModel`): the target model.
        cllm (`transformers.PreTrainedModel` or `peft.PeftModel`): what was made of it.
        assistant (`transformers.PreTrainedModel`, *optional*): draft model of assisted decoding.

    Raises:
        ValueError: if they share weights or differ in their vocabularies.
    """
    if target is not cllm and base_model_of(target) is base_model_of(cllm):
        raise ValueError(
            "The target model and the CLLM must not share their weights, got an adapter on the very model that it is "
            "compared with: its layers would act in both. Load the target model a second time."
        )
    sizes = {name: _vocab_size(model) for name, model in (("target", target), ("cllm", cllm))}
    if len(set(sizes.values())) > 1:
        raise ValueError(
            "The target model and the CLLM must have the same vocabulary, got "
            f"{sizes['target']} and {sizes['cllm']} tokens. Pass the model that the CLLM was trained from."
        )
    if assistant is not None and base_model_of(assistant) in (base_model_of(target), base_model_of(cllm)):
        raise ValueError(
            "The assistant must be a model of its own, got one of the two that are compared, whose forward passes "
            "could not be told apart. Load it a second time."
        )
    if assistant is not None and _vocab_size(assistant) != sizes["target"]:
        raise ValueError(
            f"The assistant must have the tokenizer of the target model, of {sizes['target']} tokens, got one of "
            f"{_vocab_size(assistant)} tokens. Pass a smaller model of the same family, or none."
        )


def check_prompts(prompts: Sequence[list[int]], more_prompts: Sequence[list[int]], model: Any) -> None:
    """
    Check prompts.

    Args:
        prompts (`Sequence[list[int]]`): token ids of those that are timed.
        more_prompts (`Sequence[list[int]]`): of those that are not.
        model (`transformers.PreTrainedModel` or `peft.PeftModel`): one of the models.

    Raises:
        ValueError: if there are none, or one that is empty or has a token that the model does not have.
    """
    if not len(prompts):
        raise ValueError("`prompts` must hold at least one prompt, got none.")
    limit = _vocab_size(model)
    for name, rows in (("prompts", prompts), ("more_prompts", more_prompts)):
        for number, row in enumerate(rows):
            if not len(row):
                raise ValueError(f"Every prompt must have at least one token, got none in `{name}[{number}]`.")
            if not 0 <= min(row) <= max(row) < limit:
                raise ValueError(
                    f"The tokens of a prompt must be of the models' vocabulary, from 0 to {limit - 1}, got {min(row)} "
                    f"to {max(row)} in `{name}[{number}]`. Use the models' own tokenizer."
                )


def _vocab_size(model: Any) -> int:
    return model.config.get_text_config().vocab_size
