"""Prompts, and responses from elsewhere, as tokens: what a collection begins with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
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


def check_ids(rows: Sequence[PromptRow], vocab_size: int) -> None:
    """
    Check that all tokens are in a vocabulary.

    Args:
        rows (`Sequence[PromptRow]`): prompts and responses.
        vocab_size (`int`): tokens that the model has embeddings for.

    Raises:
        ValueError: for the first prompt or response that has another token.
    """
    for row in rows:
        for what, ids in (("prompt", row.prompt_ids), ("response", row.response_ids or [])):
            if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
                wrong = min(ids) if min(ids) < 0 else max(ids)
                raise ValueError(
                    f"Every token must be in the model's vocabulary of {vocab_size}, got {wrong} in the {what} of "
                    f"prompt {row.index}. Use the tokenizer of the model, or resize its embeddings."
                )


def _tokenize_prompts(
    prompts: list[Any], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[str], list[list[int]], list[bool]]:
    """Texts, tokens, and for each whether the tokenizer adds its special tokens to the text."""
    texts: list[str] = []
    special: list[bool] = []
    ready: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        ids = _as_ids(prompt)
        if isinstance(prompt, str):
            texts.append(prompt)
        elif ids is not None:
            if min(ids, default=0) < 0:
                raise ValueError(f"A token id must be at least 0, got {min(ids)} in prompt {index}. Leave labels out.")
            ready[index] = ids
            texts.append(str(tokenizer.decode(ids)))
        elif isinstance(prompt, Sequence) and all(isinstance(message, Mapping) for message in prompt):
            # The template already holds the special tokens.
            text = tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, tokenize=False)
            texts.append(str(text))
        else:
            raise ValueError(
                "A prompt must be a text, a list of chat messages or a list of token ids, got "
                f"{prompt!r} as prompt {index}. Pass a column of a dataset, such as `dataset['question']`."
            )
        special.append(isinstance(prompt, str))
    for adds in (True, False):
        chosen = [index for index, own in enumerate(special) if own == adds and index not in ready]
        ready.update(zip(chosen, _encode([texts[index] for index in chosen], adds, tokenizer)))
    return texts, [ready[index] for index in range(len(texts))], special


def _tokenize_responses(
    responses: list[Any],
    texts: list[str],
    prompt_ids: list[list[int]],
    special: list[bool],
    tokenizer: PreTrainedTokenizerBase,
) -> list[list[int]]:
    out = []
    for index, (response, text, before, adds) in enumerate(zip(responses, texts, prompt_ids, special)):
        ids = _as_ids(response)
        if isinstance(response, str):
            # Together with the prompt, since tokenizers begin a text in ways of their own.
            whole = _encode([text + response], adds, tokenizer)[0]
            alone = whole[: len(before)] != before
            out.append(_encode([response], False, tokenizer)[0] if alone else whole[len(before) :])
        elif ids is not None:
            out.append(ids)
        else:
            raise ValueError(
                f"A response must be a text or a list of token ids, got {response!r} as response {index}."
            )
    return out


def _as_ids(value: Any) -> list[int] | None:
    """Token ids as a list of numbers, if a value is that; arrays and tensors are."""
    if isinstance(value, (str, bytes, Mapping)):
        return None
    value = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(value, Sequence) or not all(isinstance(token, Integral) for token in value):
        return None
    return [int(token) for token in value]


def _encode(texts: list[str], adds_special: bool, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Tokens of texts that go on: without the stop token that some tokenizers add at the end."""
    if not texts:
        return []
    encoded = tokenizer(texts, add_special_tokens=adds_special)["input_ids"]
    bare = list(tokenizer(texts[0], add_special_tokens=False)["input_ids"])
    adds_stop = adds_special and list(encoded[0])[-len(bare) - 1 :] == [*bare, tokenizer.eos_token_id]
    return [list(ids[:-1] if adds_stop else ids) for ids in encoded]
