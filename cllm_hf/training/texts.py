"""Prompts and responses that are given as text: turned into the tokens that a training without states reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from datasets import Dataset, Features, IterableDataset
from transformers import PreTrainedTokenizerBase

from ..trajectories.prompts import has_texts, is_chat, render_chat, tokenize_rows
from ..trajectories.schema import features
from .config import CLLMConfig


_KEPT = ("data_id", "label_ids")
_MARK = "a response"
_CHAT = "messages"


def tokenize_texts(dataset: Any, config: CLLMConfig, find_tokenizer: Callable[[], Any]) -> Any:
    """
    Turn prompts and responses as text into tokens, if a dataset holds these; another one stays as it is.

    A prompt that is chat messages goes through the chat template. Responses are tokenized as they go on with their
    prompt, and get the token that ends a response where that is missing; those that are token ids stay as they are.
    Of whole chats in a column `messages`, as `trl.SFTTrainer` takes them, the last message is the response.
    """
    if not isinstance(dataset, (Dataset, IterableDataset)):
        return dataset
    columns = list(_columns(dataset))
    if _CHAT in columns and not has_texts(columns) and "prompt_ids" not in columns:
        dataset = dataset.map(_split_chat, with_indices=True, remove_columns=_CHAT)
    if not has_texts(_columns(dataset)):
        return dataset
    columns = list(_columns(dataset))
    if config.trajectory_source != "online":
        raise ValueError(
            f"`trajectory_source={config.trajectory_source!r}` takes states, got prompts and responses without (the "
            f'columns {", ".join(columns)}). Pass `trajectory_source="online"` or `lossless=True`, or collect '
            "states to these responses with `TrajectoryBuilder` (`cllm collect --response-column`)."
        )
    convert = partial(_convert, tokenizer=find_tokenizer())
    wanted = features(responses_only=True)
    if "label_ids" in columns and dataset.features is not None:
        wanted = Features({**wanted, "label_ids": dataset.features["label_ids"]})
    options = {} if isinstance(dataset, IterableDataset) else {"desc": "Tokenizing"}
    left_out = [name for name in columns if name not in _KEPT]
    with config.main_process_first(desc="tokenizing"):  # the others read what it has left in the cache
        return dataset.map(
            convert, batched=True, with_indices=True, remove_columns=left_out, features=wanted, **options
        )


def _split_chat(record: Mapping[str, Any], place: int) -> dict[str, Any]:
    messages = record[_CHAT]
    if not is_chat(messages) or len(messages) < 2 or messages[-1].get("role") != "assistant":
        raise ValueError(
            f"Chats in `messages` must end in a message of the assistant, got another one in record {place}, counted "
            "from 0. Drop that record, or its last messages."
        )
    return {"prompt": messages[:-1], "completion": messages[-1:]}


def _columns(dataset: Dataset | IterableDataset) -> list[str]:
    if dataset.column_names is not None:
        return dataset.column_names
    return list(next(iter(dataset), {}))  # a stream may not know them


def _convert(batch: Mapping[str, list[Any]], places: list[int], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    given = batch["response"] if "response" in batch else batch["completion"]
    responses = [_text_of(response, place) for response, place in zip(given, places)]
    empty = next((place for response, place in zip(responses, places) if response is not None and not response), None)
    if empty is not None:
        raise ValueError(
            f"A response must have text, got an empty one as response {empty}, counted from 0. Drop such rows: "
            '`dataset.filter(lambda row: row["response"])`.'
        )
    names = [str(name) for name in batch.get("data_id", places)]
    rows = tokenize_rows(names, batch["prompt"], responses, tokenizer, places[0])
    ends: dict[bool, int | None] = {}
    found: dict[str, list[Any]] = {name: [] for name in features(responses_only=True)}
    for row, prompt, response in zip(rows, batch["prompt"], responses):
        if is_chat(prompt) not in ends:
            ends[is_chat(prompt)] = _find_end(prompt, tokenizer)
        ids, end = list(row.response_ids or ()), ends[is_chat(prompt)]
        if row.may_stop and ids and end is not None and ids[-1] not in (end, tokenizer.eos_token_id):
            ids.append(end)
        text = response if row.may_stop else tokenizer.decode(ids, skip_special_tokens=True)
        for name, value in zip(found, (row.data_id, row.text, text, row.prompt_ids, ids)):
            found[name].append(value)
    return found


def _text_of(response: Any, place: int) -> Any:
    """The text of a response that is chat messages, as in TRL's format of prompts and completions."""
    if not is_chat(response):
        return response
    if len(response) != 1 or not isinstance(response[0].get("content"), str):
        raise ValueError(
            f"A response must be text, token ids or one message with text in `content`, got {len(response)} messages "
            f"as response {place}. Put what stands before the last message into `prompt`."
        )
    return response[0]["content"]


def _find_end(prompt: Any, tokenizer: Any) -> int | None:
    """The token that ends a response: the one that the chat template writes after it, or the stop token."""
    if is_chat(prompt):
        try:
            chat = [*prompt, {"role": "assistant", "content": _MARK}]
            after = render_chat(chat, tokenizer, "the first prompt", is_answered=True).rpartition(_MARK)[2]
        except ValueError:  # a template that takes no response
            after = ""
        ids = tokenizer(after, add_special_tokens=False)["input_ids"]
        if ids and ids[0] in tokenizer.added_tokens_decoder:
            return ids[0]
    return tokenizer.eos_token_id
