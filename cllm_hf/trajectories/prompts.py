"""Prompts, and responses from elsewhere, as tokens: what a collection begins with."""

from __future__ import annotations

import hashlib
import json
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from numbers import Integral
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..reading import check_unicode
from .chats import check_chat, render_chat


Prompt = str | Sequence[Mapping[str, str]] | Sequence[int]
Response = str | Sequence[int]
# Texts at which a tokenizer is looked at before it is believed to add no stop token.
_MOST_TOLD = 100


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
        ValueError: if there are no prompts, one is of another kind, a chat that the tokenizer's template does not
            take or that is answered already, or no valid Unicode, or there are more or fewer responses.
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


def check_prompt(prompt: Any, name: str) -> None:
    """
    Check what can be wrong with a prompt, whatever the tokenizer.

    Args:
        prompt (`Any`): text, chat messages or token ids.
        name (`str`): what to call it, such as `"prompt 3"`.

    Raises:
        ValueError: for text that is no valid Unicode, and as `check_chat`.
    """
    if isinstance(prompt, str):
        check_unicode(prompt, name)
    elif _is_chat(prompt):
        check_chat(prompt, name)


def encode_prompts(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, adds_special: bool = True
) -> list[list[int]]:
    """
    Turn texts that go on into tokens: without the stop token that some tokenizers add at the end.

    Args:
        texts (`Sequence[str]`): the texts.
        tokenizer (`transformers.PreTrainedTokenizerBase`): the model's tokenizer.
        adds_special (`bool`): whether it adds its special tokens at the beginning.

    Returns:
        `list[list[int]]`: tokens of each; none for an empty text of which there is nothing but a stop token.
    """
    if not texts:
        return []
    encoded = [list(ids) for ids in tokenizer(list(texts), add_special_tokens=adds_special)["input_ids"]]
    if not adds_special or tokenizer.eos_token_id is None:
        return encoded
    ends, stop = _adds_stop(texts, tokenizer), [tokenizer.eos_token_id]
    encoded = [ids[:-1] if ends else ids for ids in encoded]
    # A stop token alone that no text stands for is no prompt, also where it is what the tokenizer begins with.
    return [
        [] if ids == stop and not tokenizer(text, add_special_tokens=False)["input_ids"] else ids
        for ids, text in zip(encoded, texts)
    ]


def _adds_stop(texts: Iterable[str], tokenizer: Any) -> bool:
    """
    Whether a tokenizer ends a text with its stop token.

    It is the same for all texts, but not every text tells: where a tokenizer begins with that token too, an empty one
    shows nothing but it.
    """
    for text in _telling_texts(texts, tokenizer):
        bare = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        whole = list(tokenizer(text)["input_ids"])
        ends = {
            tuple(whole[start + len(bare) :])
            for start in range(len(whole) - len(bare) + 1)
            if whole[start : start + len(bare)] == bare
        }
        if bare and len(ends) == 1:
            return ends == {(tokenizer.eos_token_id,)}
    return False


def _telling_texts(texts: Iterable[str], tokenizer: Any) -> Iterator[str]:
    """Texts from which it may be told: those that are given, otherwise words of the vocabulary."""
    yield from islice(dict.fromkeys(text for text in texts if text.strip()), _MOST_TOLD)
    special = set(tokenizer.all_special_ids)
    for token in range(min(len(tokenizer), _MOST_TOLD)):
        text = "" if token in special else str(tokenizer.decode([token]))
        if text.strip():
            yield text


def _is_chat(prompt: Any) -> bool:
    return (
        isinstance(prompt, Sequence)
        and not isinstance(prompt, (str, bytes))
        and bool(prompt)
        and all(isinstance(message, Mapping) for message in prompt)
    )


def _tokenize_prompts(
    prompts: list[Any], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[str], list[list[int]], list[bool]]:
    """Texts, tokens, and for each whether the tokenizer adds its special tokens to the text."""
    texts: list[str] = []
    special: list[bool] = []
    ready: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        name = f"prompt {index}"
        ids = _as_ids(prompt)
        if isinstance(prompt, str):
            texts.append(prompt)
        elif ids is not None:
            if min(ids, default=0) < 0:
                raise ValueError(f"A token id must be at least 0, got {min(ids)} in {name}. Leave labels out.")
            ready[index] = ids
            texts.append(str(tokenizer.decode(ids)))
        elif _is_chat(prompt):
            # The template already holds the special tokens.
            texts.append(render_chat(prompt, tokenizer, name))
        else:
            raise ValueError(
                "A prompt must be a text, a list of chat messages or a list of token ids, got "
                f"{reprlib.repr(prompt)} as {name}. Pass a column of a dataset, such as `dataset['question']`."
            )
        check_unicode(texts[-1], name)
        special.append(isinstance(prompt, str))
    for adds in (True, False):
        chosen = [index for index, own in enumerate(special) if own == adds and index not in ready]
        ready.update(zip(chosen, encode_prompts([texts[index] for index in chosen], tokenizer, adds)))
    return texts, [ready[index] for index in range(len(texts))], special


def _tokenize_responses(
    responses: list[Any],
    texts: list[str],
    prompt_ids: list[list[int]],
    special: list[bool],
    tokenizer: PreTrainedTokenizerBase,
) -> list[list[int]]:
    ready: dict[int, list[int]] = {}
    for index, response in enumerate(responses):
        ids = _as_ids(response)
        if isinstance(response, str):
            check_unicode(response, f"response {index}")
        elif ids is not None:
            ready[index] = ids
        else:
            raise ValueError(
                f"A response must be a text or a list of token ids, got {reprlib.repr(response)} as response {index}."
            )
    # Together with the prompt, since tokenizers begin a text in ways of their own.
    whole: dict[int, list[int]] = {}
    for adds in (True, False):
        chosen = [index for index, own in enumerate(special) if own == adds and index not in ready]
        joined = [texts[index] + responses[index] for index in chosen]
        whole.update(zip(chosen, encode_prompts(joined, tokenizer, adds)))
    for index, ids in whole.items():
        before = prompt_ids[index]
        goes_on = ids[: len(before)] == before
        ready[index] = ids[len(before) :] if goes_on else encode_prompts([responses[index]], tokenizer, False)[0]
    return [ready[index] for index in range(len(responses))]


def _as_ids(value: Any) -> list[int] | None:
    """Token ids as a list of numbers, if a value is that; arrays and tensors are."""
    if isinstance(value, (str, bytes, Mapping)):
        return None
    value = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(value, Sequence) or not all(isinstance(token, Integral) for token in value):
        return None
    return [int(token) for token in value]
