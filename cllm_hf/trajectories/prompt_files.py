"""Prompts from a file, and responses to them: a line each, as text or as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


_FIELDS = ("prompt", "question")
_RESPONSE_FIELD = "response"
_ANSWER_FIELDS = ("answer", "response")


def read_prompts(path: Path, limit: int | None = None) -> list[str]:
    """
    Read the prompts of a file, one a line; empty lines are left out.

    Args:
        path (`pathlib.Path`): plain text, or JSON objects with a field `prompt` or `question` in a file whose name
            ends in `.jsonl`, or whose first line begins with `{`.
        limit (`int`, *optional*): read only so many.

    Returns:
        `list[str]`.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it holds no prompts, is not UTF-8 text, or a line is not such a JSON object.
    """
    lines, is_json = _read_lines(path)
    lines = lines[:limit]
    return [_record_of(*line, path, _FIELDS)[0] for line in lines] if is_json else [line for _, line in lines]


def read_prompts_and_responses(
    path: Path, limit: int | None = None, prompt_field: str | None = None, response_field: str | None = None
) -> tuple[list[Any], list[Any] | None]:
    """
    Read prompts, which may be chat messages or token ids too, and responses to them where the file has some.

    Args:
        path (`pathlib.Path`): as for `read_prompts`.
        limit (`int`, *optional*): read only so many lines.
        prompt_field (`str`, *optional*): JSON field of the prompts, by default `prompt` or `question`.
        response_field (`str`, *optional*): JSON field of the responses, by default `response` if lines have it.

    Returns:
        `tuple[list, list | None]`: the prompts, and a response to each or `None`.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it holds no prompts, is not UTF-8 text, a line is not a JSON object with those fields, only some
            lines have a response, or fields are asked for of plain text.
    """
    lines, is_json = _read_lines(path)
    lines = lines[:limit]
    if not is_json:
        if prompt_field is not None or response_field is not None:
            raise ValueError(
                f"Only JSON lines have fields, got the field {prompt_field or response_field!r} for {str(path)!r}, "
                "which is plain text. Name no fields, or write a JSON object a line."
            )
        return [line for _, line in lines], None
    fields = _FIELDS if prompt_field is None else (prompt_field,)
    pairs = [_record_of(*line, path, fields, response_field or _RESPONSE_FIELD, only_text=False) for line in lines]
    with_response = [response is not None for _, response in pairs]
    if not any(with_response) and response_field is None:
        return [prompt for prompt, _ in pairs], None
    if not all(with_response):
        number = lines[with_response.index(False)][0]
        raise ValueError(
            f"Line {number} of {str(path)!r} must have text in the field `{response_field or _RESPONSE_FIELD}`, got "
            "none. Give every prompt a response, or none."
        )
    return [prompt for prompt, _ in pairs], [response for _, response in pairs]


def read_prompts_and_answers(path: Path, limit: int | None = None) -> tuple[list[str], list[str] | None]:
    """
    Read prompts, and the right answer to each where the file has them.

    Args:
        path (`pathlib.Path`): as for `read_prompts`.
        limit (`int`, *optional*): read only so many lines.

    Returns:
        `tuple[list[str], list[str] | None]`: the prompts, and their answers: the field `answer` of JSON lines, or
        else `response`.

    Raises:
        OSError: if the file cannot be read.
        ValueError: as `read_prompts`, or if only some lines have an answer.
    """
    lines, is_json = _read_lines(path)
    lines = lines[:limit]
    if not is_json:
        return [line for _, line in lines], None
    for field in _ANSWER_FIELDS:
        pairs = [_record_of(*line, path, _FIELDS, field) for line in lines]
        answers = [answer for _, answer in pairs if isinstance(answer, str)]
        if answers and len(answers) < len(lines):
            number = next(line[0] for line, (_, answer) in zip(lines, pairs) if not isinstance(answer, str))
            raise ValueError(
                f"Line {number} of {str(path)!r} must have text in the field `{field}`, got none. Give every prompt "
                "an answer, or none."
            )
        if answers:
            break
    return [prompt for prompt, _ in pairs], answers or None


def is_prompt(value: Any) -> bool:
    """
    Whether a value is text, a list of chat messages or a list of token ids.

    Args:
        value (`Any`): what stands in a field or column.

    Returns:
        `bool`.
    """
    is_chat = isinstance(value, list) and bool(value) and all(isinstance(message, dict) for message in value)
    return is_chat or is_response(value)


def is_response(value: Any) -> bool:
    """
    Whether a value is text or a list of token ids.

    Args:
        value (`Any`): what stands in a field or column.

    Returns:
        `bool`.
    """
    return isinstance(value, str) or (
        isinstance(value, list) and bool(value) and all(type(token) is int for token in value)
    )


def _read_lines(path: Path) -> tuple[list[tuple[int, str]], bool]:
    """Lines that are not empty, with their numbers from 1, and whether they are JSON."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"`--prompts` must be a text file in UTF-8, got {str(path)!r} ({error.reason}).") from error
    except OSError as error:
        raise OSError(
            f"`--prompts` must be a file that can be read, got {str(path)!r} ({error.strerror}). Check its name."
        ) from error
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise ValueError(f"`--prompts` must hold at least one prompt, got none in {str(path)!r}. Write one a line.")
    return lines, path.suffix == ".jsonl" or lines[0][1].startswith("{")


def _record_of(
    number: int,
    line: str,
    path: Path,
    fields: Sequence[str],
    response_field: str = _RESPONSE_FIELD,
    only_text: bool = True,
) -> tuple[Any, Any]:
    """The prompt of a JSON line, and the response if it has one."""
    where = f"Line {number} of {str(path)!r}"
    try:
        record: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} must be JSON, got {line[:60]!r} ({error.msg}). Correct that line.") from error
    prompt = response = None
    if isinstance(record, dict):
        prompt = next((record[name] for name in fields if name in record), None)
        response = record.get(response_field)
    if not (prompt.strip() if isinstance(prompt, str) else not only_text and is_prompt(prompt)):
        names = " or ".join(f"`{name}`" for name in fields)
        raise ValueError(
            f"{where} must be a JSON object with text in a field {names}, got {line[:60]!r}. Correct that line."
        )
    return prompt, response if is_response(response) else None
