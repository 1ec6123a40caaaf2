"""Prompts, and responses from elsewhere, as tokens: what a collection begins with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase


Prompt = str | Sequence[Mapping[str, str]] | Sequence[int]
Response = str | Sequence[int]


@dataclass(frozen=True)
class PromptRow:
    """
    A prompt as tokens.

    Attributes:
        index (`int`): its place in the collection.
        data_id (`str`): its name in the dataset: that of a `data_id` column, otherwise its place.
        text (`str`): the prompt as text, with its chat template.
        prompt_ids (`list[int]`): its tokens.
        response_ids (`list[int]`, *optional*): a response that was made elsewhere.
        may_stop (`bool`): whether that response was given as text, in which a stop token does not show.
    """

    index: int
    data_id: str
    text: str
    prompt_ids: list[int]
    response_ids: list[int] | None = None
    may_stop: bool = False


def read_rows(
    prompts: Iterable[Prompt] | Dataset,
    responses: Iterable[Response] | None,
    tokenizer: PreTrainedTokenizerBase,
) -> list[PromptRow]:
    """
    Turn prompts and responses into tokens.

    Args:
        prompts (`Iterable[str | Sequence[dict] | Sequence[int]]` or `datasets.Dataset`): texts, chat messages or token
            ids; or a dataset with them in a column `prompt`, and maybe columns `response` and `data_id`.
        responses (`Iterable[str | Sequence[int]]`, *optional*): a response to each, as text or token ids.
        tokenizer (`transformers.PreTrainedTokenizerBase`): the model's tokenizer.

    Returns:
        `list[PromptRow]`: in the order of the prompts.

    Raises:
        ValueError: if there are no prompts, one is of another kind, or there are more or fewer responses.
    """
    names: list[str] | None = None
    if isinstance(prompts, Dataset):
        columns = prompts.column_names
        if "prompt" not in columns:
            raise ValueError(
                f"A dataset of prompts must have a column `prompt`, got the columns {', '.join(columns)}. Rename one "
                "with `dataset.rename_column`, or pass it alone, such as `dataset['question']`."
            )
        if responses is None and "response" in columns:
            responses = prompts["response"]
        names = [str(name) for name in prompts["data_id"]] if "data_id" in columns else None
        prompts = prompts["prompt"]
    if isinstance(prompts, (str, Mapping)):
        raise ValueError(f"`prompts` must be a list of prompts, got {str(prompts)[:60]!r}. Pass it in a list.")
    texts, prompt_ids, special = _tokenize_prompts(list(prompts), tokenizer)
    if not texts:
        raise ValueError("`prompts` must hold at least one prompt, got none.")
    names = names or [str(index) for index in range(len(texts))]
    if responses is None:
        return [PromptRow(*row) for row in zip(range(len(texts)), names, texts, prompt_ids)]
    given = list(responses)
    if isinstance(responses, str) or len(given) != len(texts):
        raise ValueError(
            f"`responses` must hold one response for each of the {len(texts)} prompts, got {len(given)}. Pass two "
            "lists of the same length, or a dataset with the columns `prompt` and `response`."
        )
    response_ids = _tokenize_responses(given, texts, prompt_ids, special, tokenizer)
    is_text = [isinstance(response, str) for response in given]
    return [PromptRow(*row) for row in zip(range(len(texts)), names, texts, prompt_ids, response_ids, is_text)]


def fingerprint_rows(rows: Sequence[PromptRow]) -> str:
    """
    A number for a list of prompts and responses, which another list does not have.

    Args:
        rows (`Sequence[PromptRow]`): the prompts.

    Returns:
        `str`: hexadecimal.
    """
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.data_id, row.prompt_ids, row.response_ids]).encode())
    return digest.hexdigest()


def find_duplicates(rows: Sequence[PromptRow]) -> set[int]:
    """
    Find prompts that stand in the list before, token for token.

    Args:
        rows (`Sequence[PromptRow]`): the prompts.

    Returns:
        `set[int]`: the `index` of all but the first of equal ones.
    """
    seen: set[tuple[int, ...]] = set()
    duplicates = set()
    for row in rows:
        prompt = tuple(row.prompt_ids)
        if prompt in seen:
            duplicates.add(row.index)
        seen.add(prompt)
    return duplicates


def is_held_out(text: str, fraction: float) -> bool:
    """
    Say whether a prompt belongs to the test split.

    The text alone decides. So equal prompts are never on both sides, and a prompt stays on its side when others come
    or go, on another machine, and with another tokenizer.

    Args:
        text (`str`): the prompt.
        fraction (`float`): share of all texts that belong there, from 0 to 1.

    Returns:
        `bool`.
    """
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def _tokenize_prompts(
    prompts: list[Any], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[str], list[list[int]], list[bool]]:
    """Texts, tokens, and for each whether the tokenizer adds its special tokens to the text."""
    texts: list[str] = []
    special: list[bool] = []
    ready: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        kinds = {type(part) for part in prompt} if isinstance(prompt, Sequence) else set()
        if isinstance(prompt, str):
            texts.append(prompt)
        elif kinds and all(issubclass(kind, Mapping) for kind in kinds):
            # The template already holds the special tokens.
            text = tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, tokenize=False)
            texts.append(str(text))
        elif kinds == {int}:
            ready[index] = list(prompt)
            texts.append(str(tokenizer.decode(prompt)))
        else:
            raise ValueError(
                "A prompt must be a text, a list of chat messages or a list of token ids, got "
                f"{prompt!r}. Pass a column of a dataset, such as `dataset['question']`."
            )
        special.append(isinstance(prompt, str))
    for adds in (True, False):
        chosen = [index for index, own in enumerate(special) if own == adds and index not in ready]
        if chosen:
            ids = tokenizer([texts[index] for index in chosen], add_special_tokens=adds)["input_ids"]
            ready.update(zip(chosen, ids))
    return texts, [list(ready[index]) for index in range(len(texts))], special


def _tokenize_responses(
    responses: list[Any],
    texts: list[str],
    prompt_ids: list[list[int]],
    special: list[bool],
    tokenizer: PreTrainedTokenizerBase,
) -> list[list[int]]:
    out = []
    for response, text, before, adds in zip(responses, texts, prompt_ids, special):
        if isinstance(response, str):
            # Together with the prompt, since tokenizers begin a text in ways of their own.
            whole = list(tokenizer(text + response, add_special_tokens=adds)["input_ids"])
            alone = tokenizer(response, add_special_tokens=False)["input_ids"]
            out.append(whole[len(before) :] if whole[: len(before)] == before else list(alone))
        elif isinstance(response, Sequence) and all(type(token) is int for token in response):
            out.append(list(response))
        else:
            raise ValueError(f"A response must be a text or a list of token ids, got {response!r}.")
    return out
