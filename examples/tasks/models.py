"""Models from scratch and their tokenizers; adapters; saving by several processes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from accelerate import PartialState
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from cllm_hf.files import save_whole
from cllm_hf.process import Process

from .model_options import ModelOptions


_PAD, _BOS, _EOS = "<pad>", "<s>", "</s>"


def make_tokenizer(texts: Iterable[str], vocab_size: int, split_spaces: bool = False) -> PreTrainedTokenizerFast:
    """
    Make a tokenizer for a model from scratch: byte-level BPE in which each digit is a token of its own.

    Args:
        texts (`Iterable[str]`): what to train it on.
        vocab_size (`int`): tokens, of which 259 are the bytes and `<pad>`, `<s>` and `</s>`.
        split_spaces (`bool`): whether each space is a token of its own, so that a word has the same tokens whatever
            stands before it; otherwise it is part of the word after it.

    Returns:
        `transformers.PreTrainedTokenizerFast`: adds no special tokens to a text.

    Raises:
        ValueError: if the vocabulary does not hold all bytes.
    """
    if vocab_size < 259:
        raise ValueError(f"`vocab_size` must be at least 259, for all bytes and 3 special tokens, got {vocab_size}.")
    tokenizer = Tokenizer(models.BPE())
    splits: list[Any] = [pre_tokenizers.Digits(individual_digits=True)]
    if split_spaces:
        splits.append(pre_tokenizers.Split(" ", "isolated"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_PAD, _BOS, _EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=_PAD,
        bos_token=_BOS,
        eos_token=_EOS,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def make_model(options: ModelOptions, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """
    Make a model from scratch.

    Args:
        options (`ModelOptions`): its architecture and shape.
        tokenizer (`transformers.PreTrainedTokenizerBase`): whose tokens it has.

    Returns:
        `transformers.PreTrainedModel`: with random weights.

    Raises:
        ValueError: for a shape that its config refuses, or an architecture that writes no text.
    """
    shape = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        **options.shape,
    }
    try:
        config = AutoConfig.for_model(str(options.architecture), **shape)
        kind: Any = {"attn_implementation": options.attn_implementation} if options.attn_implementation else {}
        return AutoModelForCausalLM.from_config(config, **kind)
    except Exception as error:  # configs of the hosts are checked by validators of many kinds
        reason = " ".join(str(error).split())
        raise ValueError(
            f"There is no model of architecture {options.architecture!r} with {shape}: {reason}"
        ) from error


def make_adapter(options: ModelOptions) -> Any:
    """
    Options of the adapters that are trained, if any.

    Args:
        options (`ModelOptions`): the model.

    Returns:
        `peft.LoraConfig` or `None`.
    """
    if options.lora is None:
        return None
    from peft import LoraConfig

    return LoraConfig(**{"task_type": "CAUSAL_LM", "target_modules": "all-linear", **options.lora})


def loading_options(options: ModelOptions) -> dict[str, Any]:
    """
    What `from_pretrained` is given for a model that is trained.

    Args:
        options (`ModelOptions`): the model.

    Returns:
        `dict[str, Any]`.
    """
    given = {"dtype": options.dtype, "attn_implementation": options.attn_implementation}
    return {name: value for name, value in given.items() if value is not None}


def wait_for_all() -> None:
    """Wait until every process is here."""
    if Process.current().count > 1:
        PartialState().wait_for_everyone()


def release(trainer: Any) -> None:
    """
    Free the memory of a trainer, for the next step.

    Args:
        trainer (`transformers.Trainer`): it does not train any more.
    """
    # If the wrapper of the model were the last to hold the process group, it would wait for gloo's threads, which may
    # wait for the lock of the interpreter, which it does not release.
    trainer.model_wrapped = trainer.model
    trainer.accelerator.free_memory()


def leave_others() -> None:
    """Leave the other processes, at the very end."""
    if Process.current().count > 1:
        PartialState().destroy_process_group()


def save_together(folder: Path, save: Callable[[Path], object]) -> None:
    """
    Save by all processes into a folder that appears under its name only when it is complete.

    Args:
        folder (`pathlib.Path`): the folder; its parent exists.
        save (`Callable[[pathlib.Path], object]`): writes everything into the folder it is given; called in every
            process, as sharded models are gathered from all.
    """
    unfinished = folder.with_name(".unfinished") / folder.name  # a model card is named after its folder
    if Process.current().is_first:
        shutil.rmtree(unfinished.parent, ignore_errors=True)
        unfinished.mkdir(parents=True)
    wait_for_all()
    save(unfinished)
    wait_for_all()
    if Process.current().is_first:
        save_whole(folder, unfinished.rename)
        unfinished.parent.rmdir()
    wait_for_all()
