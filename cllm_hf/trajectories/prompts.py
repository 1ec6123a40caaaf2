"""Prompts, and responses from elsewhere, as tokens: what a collection begins with. Chats are checked and rendered."""

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

from ..files import check_unicode


Prompt = str | Sequence[Mapping[str, str]] | Sequence[int]
Response = str | Sequence[int]
# Rows that are tokenized together: a tokenizer keeps far more of each than its tokens until it has done all.
_ROWS_AT_ONCE = 1000
# Texts at which a tokenizer is looked at before it is believed to add no stop token.
_MOST_TOLD = 100
# What datasets call the one who responds; templates know `assistant`.
_RESPONDERS = ("assistant", "model", "gpt", "bot", "chatbot")
# Roles that templates know; of others some say nothing and leave the message out.
_KNOWN = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
_REMEDY = 'Write each message as `{"role": "user", "content": "..."}`'


@dataclass(frozen=True)
class PromptRow:
    """A prompt as tokens."""

    index: int  # its place in the collection
    data_id: str  # its name in the dataset: that of a `data_id` column, otherwise its place
    text: str  # with its chat template
    prompt_ids: list[int]
    response_ids: list[int] | None = None  # a response that was made elsewhere
    may_stop: bool = False  # that response was given as text, in which a stop token does not show


def read_rows(
    prompts: Iterable[Prompt] | Dataset,
    responses: Iterable[Response] | None,
    tokenizer: PreTrainedTokenizerBase,
) -> list[PromptRow]:
    """Turn prompts and responses into tokens; `TrajectoryBuilder.collect` says what may be passed."""
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
    asked, given = list(prompts), None if responses is None else list(responses)
    if not asked:
        raise ValueError("`prompts` must hold at least one prompt, got none.")
    names = names or [str(index) for index in range(len(asked))]
    if given is not None and (isinstance(responses, str) or len(given) != len(asked)):
        raise ValueError(
            f"`responses` must hold one response for each of the {len(asked)} prompts, got {len(given)}. Pass two "
            "lists of the same length, or a dataset with the columns `prompt` and `response`."
        )
    rows = []
    for first in range(0, len(asked), _ROWS_AT_ONCE):
        part = slice(first, first + _ROWS_AT_ONCE)
        rows += tokenize_rows(names[part], asked[part], None if given is None else given[part], tokenizer, first)
    return rows


def tokenize_rows(
    names: Sequence[str],
    prompts: list[Any],
    responses: list[Any] | None,
    tokenizer: PreTrainedTokenizerBase,
    first: int = 0,
) -> list[PromptRow]:
    """Turn some prompts and responses into tokens, of which `first` is the place of the first one."""
    texts, prompt_ids, special = _tokenize_prompts(prompts, tokenizer, first)
    places = range(first, first + len(texts))
    if responses is None:
        return [PromptRow(*row) for row in zip(places, names, texts, prompt_ids)]
    response_ids = _tokenize_responses(responses, texts, prompt_ids, special, tokenizer, first)
    is_text = [isinstance(response, str) for response in responses]
    return [PromptRow(*row) for row in zip(places, names, texts, prompt_ids, response_ids, is_text)]


def fingerprint_rows(rows: Sequence[PromptRow]) -> str:
    """A number, in hexadecimal, for a list of prompts and responses, which another list does not have."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.data_id, row.prompt_ids, row.response_ids]).encode())
    return digest.hexdigest()


def find_duplicates(rows: Sequence[PromptRow]) -> set[int]:
    """The `index` of all but the first of prompts that are equal token for token."""
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
    Whether a prompt is among the `fraction` of all that belongs to the test split.

    The text alone decides. So equal prompts are never on both sides, and a prompt stays on its side when others come
    or go, on another machine, and with another tokenizer.
    """
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def check_ids(rows: Sequence[PromptRow], vocab_size: int) -> None:
    """Check that all tokens are in a vocabulary."""
    for row in rows:
        for what, ids in (("prompt", row.prompt_ids), ("response", row.response_ids or [])):
            if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
                wrong = min(ids) if min(ids) < 0 else max(ids)
                raise ValueError(
                    f"Every token must be in the model's vocabulary of {vocab_size}, got {wrong} in the {what} of "
                    f"prompt {row.index}. Use the tokenizer of the model, or resize its embeddings."
                )


def has_texts(columns: Iterable[str] | None) -> bool:
    """Whether the columns of a dataset are those of prompts and responses that are not tokens yet."""
    names = set(columns or ())
    return "prompt_ids" not in names and "prompt" in names and bool(names & {"response", "completion"})


def check_prompt(prompt: Any, name: str) -> None:
    """Check what can be wrong with a prompt, whatever the tokenizer; `name` is such as "prompt 3"."""
    if isinstance(prompt, str):
        check_unicode(prompt, name)
    elif is_chat(prompt):
        check_chat(prompt, name)


def encode_prompts(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, adds_special: bool = True
) -> list[list[int]]:
    """
    Turn texts that go on into tokens: without the stop token that some tokenizers add at the end.

    Nothing is left of an empty text of which there is nothing but a stop token. Without `adds_special` the tokenizer
    adds no special tokens at the beginning either.
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


def _tokenize_prompts(
    prompts: list[Any], tokenizer: PreTrainedTokenizerBase, first: int
) -> tuple[list[str], list[list[int]], list[bool]]:
    """Texts, tokens, and for each whether the tokenizer adds its special tokens to the text."""
    texts: list[str] = []
    ready: dict[int, list[int]] = {}
    special = [isinstance(prompt, str) for prompt in prompts]  # a chat template already holds them
    for index, prompt in enumerate(prompts):
        name = f"prompt {first + index}"
        ids = as_ids(prompt)
        if isinstance(prompt, str):
            texts.append(prompt)
        elif ids is not None:
            if min(ids, default=0) < 0:
                raise ValueError(f"A token id must be at least 0, got {min(ids)} in {name}. Leave labels out.")
            ready[index] = ids
            texts.append(str(tokenizer.decode(ids)))
        elif is_chat(prompt):
            texts.append(render_chat(prompt, tokenizer, name))
        else:
            raise ValueError(
                "A prompt must be a text, a list of chat messages or a list of token ids, got "
                f"{reprlib.repr(prompt)} as {name}. Pass a column of a dataset, such as `dataset['question']`."
            )
        check_unicode(texts[-1], name)
    ready |= _encode({index: text for index, text in enumerate(texts) if index not in ready}, special, tokenizer)
    return texts, [ready[index] for index in range(len(texts))], special


def _tokenize_responses(
    responses: list[Any],
    texts: list[str],
    prompt_ids: list[list[int]],
    special: list[bool],
    tokenizer: PreTrainedTokenizerBase,
    first: int,
) -> list[list[int]]:
    ready: dict[int, list[int]] = {}
    for index, response in enumerate(responses):
        ids = as_ids(response)
        if isinstance(response, str):
            check_unicode(response, f"response {first + index}")
        elif ids is not None:
            ready[index] = ids
        else:
            raise ValueError(
                f"A response must be a text or a list of token ids, got {reprlib.repr(response)} as response "
                f"{first + index}, counted from 0. Leave that record out, or give it one."
            )
    # Together with the prompt, since tokenizers begin a text in ways of their own.
    joined = {index: texts[index] + text for index, text in enumerate(responses) if index not in ready}
    for index, ids in _encode(joined, special, tokenizer).items():
        before = prompt_ids[index]
        goes_on = ids[: len(before)] == before
        ready[index] = ids[len(before) :] if goes_on else encode_prompts([responses[index]], tokenizer, False)[0]
    return [ready[index] for index in range(len(responses))]


def _encode(texts: Mapping[int, str], special: list[bool], tokenizer: PreTrainedTokenizerBase) -> dict[int, list[int]]:
    """Tokens of texts by their places, of which `special` says whether the tokenizer adds its special tokens."""
    encoded: dict[int, list[int]] = {}
    for adds in (True, False):
        chosen = [index for index in texts if special[index] == adds]
        encoded.update(zip(chosen, encode_prompts([texts[index] for index in chosen], tokenizer, adds)))
    # Equal numbers become one object, so that a token takes 8 bytes instead of 36.
    same: dict[int, int] = {}
    return {index: [same.setdefault(token, token) for token in ids] for index, ids in encoded.items()}


def as_ids(value: Any) -> list[int] | None:
    """Token ids as a list of numbers, if a value is that; arrays and tensors are."""
    if isinstance(value, (str, bytes, Mapping)):
        return None
    value = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(value, Sequence) or not all(isinstance(token, Integral) for token in value):
        return None
    return [int(token) for token in value]


def is_chat(prompt: Any) -> bool:
    return (
        isinstance(prompt, Sequence)
        and not isinstance(prompt, (str, bytes))
        and bool(prompt)
        and all(isinstance(message, Mapping) for message in prompt)
    )


def check_chat(messages: Sequence[Any], name: str, is_answered: bool = False) -> None:
    """
    Check that each message has a role and text, and unless the chat is answered, that it waits for a response.

    What a template would fail at, or take in silence, is said with the chat's `name`, such as "prompt 3".
    """
    for number, message in enumerate(messages):
        where = f"message {number} of {name}"
        if not isinstance(message, Mapping):
            raise ValueError(f"A chat must be a list of messages, got {reprlib.repr(message)} as {where}. {_REMEDY}.")
        if not isinstance(message.get("role"), str):
            shown = f"the keys {', '.join(map(repr, message))}" if "role" not in message else repr(message["role"])
            remedy = _REMEDY
            if "from" in message or "value" in message:
                remedy += (
                    "; in ShareGPT's form `from` is the role (`human` is `user`, `gpt` is `assistant`) and `value` is "
                    "the content"
                )
            raise ValueError(f"A message must have text in `role`, got {shown} in {where}. {remedy}.")
        _check_content(message, where)
    role = messages[-1]["role"]
    if role.lower() in _RESPONDERS and not is_answered:
        raise ValueError(
            f"A chat must end with what the model responds to, got {name}, which ends with a response, of the role "
            f"{role!r}. Drop that message, or pass its text in `response` (`responses` of the builder)."
        )


def _check_content(message: Mapping[str, Any], where: str) -> None:
    content = message.get("content")
    if isinstance(content, str):
        return
    if content is None:
        if message.get("tool_calls") or message.get("function_call"):
            return
        raise ValueError(f"A message must have text in `content`, got none in {where}. {_REMEDY}, or leave it out.")
    if not isinstance(content, Sequence):
        raise ValueError(f"A message must have text in `content`, got {reprlib.repr(content)} in {where}. {_REMEDY}.")
    for part in content:
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text" if isinstance(part, str) else None
        if kind != "text":
            raise ValueError(
                f"The parts of a message must be text, got {reprlib.repr(part)} in {where}. Trajectories are of text "
                "alone: leave out such parts, or such prompts."
            )


def render_chat(
    messages: Sequence[Any], tokenizer: PreTrainedTokenizerBase, name: str, is_answered: bool = False
) -> str:
    """
    Turn chat messages into text by the tokenizer's chat template, with its special tokens.

    The template begins a response, unless the messages end with one.
    """
    check_chat(messages, name, is_answered)
    try:
        text = tokenizer.apply_chat_template(list(messages), add_generation_prompt=not is_answered, tokenize=False)
    except Exception as error:  # a template is a program of its own: it raises anything
        if getattr(tokenizer, "chat_template", None) is None:
            raise ValueError(
                f"Chat messages take a tokenizer with a chat template, got {name} and a tokenizer without one. Use an "
                "instruct model, set `tokenizer.chat_template`, or pass the prompt as text."
            ) from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"The tokenizer's chat template must take the messages, got {name}, at which it fails ({reason}). "
            f"{_REMEDY}, with roles that the template knows and in an order that it takes, and text instead of a list "
            "of parts."
        ) from error
    _check_rendered(messages, str(text), name)
    return str(text)


def _check_rendered(messages: Sequence[Mapping[str, Any]], text: str, name: str) -> None:
    """Refuse what a template takes without a word: a list as Python shows it, and a message that it leaves out."""
    for number, message in enumerate(messages):
        content, role = message.get("content"), message["role"]
        if content and not isinstance(content, str) and str(content) in text:
            raise ValueError(
                "The tokenizer's chat template takes text alone in `content`, got a list of parts in message "
                f"{number} of {name}. Join their texts to one."
            )
        if isinstance(content, str) and role not in _KNOWN and content.strip() not in text:
            raise ValueError(
                f"The tokenizer's chat template leaves out messages of the role {role!r}, got one as message {number} "
                f"of {name}. {_REMEDY}, with roles that the template knows."
            )
