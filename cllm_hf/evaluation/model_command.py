"""`cllm benchmark models`: from its options to a text, files and a picture."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from ..loading import load_tokenizer
from ..names import Name
from ..trajectories.prompt_files import read_prompts_and_answers
from .judgements import Judgement
from .model_comparison import Judge, compare_models
from .model_plot import plot_models
from .model_report import format_models
from .preparing import check_outputs, finish, load_model, prepare_device, tokenize


def run_models(options: argparse.Namespace) -> str:
    """
    Run `cllm benchmark models`.

    Args:
        options (`argparse.Namespace`): its options, by their names, and the `command_line`.

    Returns:
        `str`: the result as Markdown.

    Raises:
        OSError: if a file cannot be read or written, or a model cannot be loaded.
        ValueError: if models do not fit together or prompts are not usable.
    """
    names = {name: getattr(options, name) for name in ("target", "model", "assistant")}
    for option, name in names.items():
        if name is not None:
            Name.find(name).check(f"--{option}", "model")
    texts, answers = read_prompts_and_answers(options.prompts, options.num_prompts + options.num_more_prompts)
    check_outputs(options)
    device = prepare_device(options)
    tokenizer = load_tokenizer(options.target)
    _check_tokenizers(tokenizer, names)
    prompts = tokenize(tokenizer, texts)
    target, cllm, assistant = (None if name is None else load_model(name, options, device) for name in names.values())
    report = compare_models(
        target,
        cllm,
        prompts[: options.num_prompts],
        block_size=options.block_size,
        max_new_tokens=options.max_new_tokens,
        more_block_sizes=options.more_block_sizes,
        candidates=options.candidates,
        judge=None if answers is None else make_equality_judge(tokenizer, answers),
        more_prompts=prompts[options.num_prompts :],
        assistant=assistant,
        is_compiled=options.compile,
        batch_size=options.batch_size,
        repeats=options.repeats,
        pad_token_id=tokenizer.pad_token_id or 0,
        show_progress=sys.stderr.isatty(),
    )
    text = finish({**report, "name": options.model}, format_models(report), options)
    if options.plot is not None:
        plot_models(report, options.plot)
    return text


def make_equality_judge(tokenizer: Any, answers: Sequence[str]) -> Judge:
    """
    Make a judge for which a response is right if it is the answer, but for white space around it.

    Args:
        tokenizer (`transformers.PreTrainedTokenizerBase`): to read responses; special tokens are left out.
        answers (`Sequence[str]`): to all prompts, in their order.

    Returns:
        `Callable[[list[list[int]]], list[Judgement]]`: its kinds are `"equal"` and `"different"`.
    """

    def judge(responses: list[list[int]]) -> list[Judgement]:
        texts = [str(tokenizer.decode(response, skip_special_tokens=True)) for response in responses]
        are_equal = [text.strip() == answer.strip() for text, answer in zip(texts, answers)]
        return [Judgement(is_equal, "equal" if is_equal else "different") for is_equal in are_equal]

    return judge


def _check_tokenizers(tokenizer: Any, names: dict[str, str | None]) -> None:
    """The token ids of one model are given to the others. A model saved without a tokenizer is believed."""
    vocabulary = tokenizer.get_vocab()
    for option in ("model", "assistant"):
        name = names[option]
        if name is None:
            continue
        try:
            other = load_tokenizer(name).get_vocab()
        except OSError:
            continue
        if other != vocabulary:
            raise ValueError(
                f"`--{option}` must have the tokenizer of `--target`, got {name!r}, whose tokens are others. Pass a "
                "model of the same family."
            )
