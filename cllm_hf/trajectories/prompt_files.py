"""Prompts from a file, and responses to them: a line each, as text or as JSON, or the records of a JSON array."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..reading import check_unicode, decode_text, parse_json
from .prompts import check_prompt


_FIELDS = ("prompt", "question")
_RESPONSE_FIELD = "response"
_ANSWER_FIELDS = ("answer", "response")
# Tables that `datasets` reads, and no text with a prompt a line.
_TABLES = (".csv", ".tsv", ".parquet", ".arrow")
_JSON_LINES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class _Line:
    """A line of text or a JSON value of a file of prompts, and what to call its place."""

    place: str
    value: Any
    is_json: bool


def read_prompts(path: Path, limit: int | None = None) -> list[str]:
    """
    Read the prompts of a file, one a line; empty lines are left out.

    Args:
        path (`pathlib.Path`): plain text; or JSON objects with a field `prompt` or `question`, one a line or all in an
            array, in a file whose name ends in `.jsonl` or `.json`, or which begins like that.
        limit (`int`, *optional*): read only so many.

    Returns:
        `list[str]`.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it holds no prompts, is a table or anything else but UTF-8 text, a line is not such a JSON
            object, or a text is no valid Unicode.
    """
    return [_record_of(line, path, index, _FIELDS)[0] for index, line in enumerate(_read(path, limit))]


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
    lines = _read(path, limit)
    if not lines[0].is_json:
        if prompt_field is not None or response_field is not None:
            raise ValueError(
                f"Only JSON lines have fields, got the field {prompt_field or response_field!r} for {str(path)!r}, "
                "which is plain text. Name no fields, or write a JSON object a line."
            )
        return [line.value for line in lines], None
    fields = _FIELDS if prompt_field is None else (prompt_field,)
    pairs = [
        _record_of(line, path, index, fields, response_field or _RESPONSE_FIELD, only_text=False)
        for index, line in enumerate(lines)
    ]
    with_response = [response is not None for _, response in pairs]
    if not any(with_response) and response_field is None:
        return [prompt for prompt, _ in pairs], None
    if not all(with_response):
        place = lines[with_response.index(False)].place
        raise ValueError(
            f"{place} of {str(path)!r} must have text in the field `{response_field or _RESPONSE_FIELD}`, got "
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
    lines = _read(path, limit)
    if not lines[0].is_json:
        return [line.value for line in lines], None
    for field in _ANSWER_FIELDS:
        pairs = [_record_of(line, path, index, _FIELDS, field) for index, line in enumerate(lines)]
        answers = [answer for _, answer in pairs if isinstance(answer, str)]
        if answers and len(answers) < len(lines):
            place = next(line.place for line, (_, answer) in zip(lines, pairs) if not isinstance(answer, str))
            raise ValueError(
                f"{place} of {str(path)!r} must have text in the field `{field}`, got none. Give every prompt an "
                "answer, or none."
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


def _read(path: Path, limit: int | None) -> list[_Line]:
    """The first lines or records of a file, at least one."""
    text = _read_text(path)
    numbered = [(number, line.strip()) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not numbered:
        raise ValueError(f"`--prompts` must hold at least one prompt, got none in {str(path)!r}. Write one a line.")
    first = numbered[0][1]
    is_json = path.suffix.lower() in (".json", *_JSON_LINES) or first.startswith("{") or first == "["
    records = _read_whole(path, text, first, is_json)
    if records is not None:
        if not records:
            raise ValueError(f"`--prompts` must hold at least one prompt, got none in {str(path)!r}, an empty array.")
        return [_Line(f"Record {number}", record, True) for number, record in enumerate(records[:limit], start=1)]
    if not is_json:
        lines = [_Line(f"Line {number}", line, False) for number, line in numbered[:limit]]
    else:
        lines = [_Line(f"Line {number}", _parse(line, number, path), True) for number, line in numbered[:limit]]
    if not lines:
        raise ValueError(f"`--prompts` must give at least one prompt, got a limit of {limit}. Raise it.")
    return lines


def _read_text(path: Path) -> str:
    hint = f"`cllm collect --dataset-name {path}`"
    if path.is_dir():
        raise OSError(
            f"`--prompts` must be a file that can be read, got the folder {str(path)!r}. Name a file in it, or read "
            f"it as a dataset by {hint}."
        )
    if path.is_file() and path.suffix.lower() in _TABLES:
        raise ValueError(
            f"`--prompts` must be a text file with a prompt a line, or JSON, got the table {str(path)!r}. Convert it "
            f"to JSON lines, or read it as a dataset by {hint}."
        )
    try:
        content = path.read_bytes()
    except OSError as error:
        raise OSError(
            f"`--prompts` must be a file that can be read, got {str(path)!r} ({error.strerror}). Check its name."
        ) from error
    try:
        return decode_text(content)
    except ValueError as error:
        raise ValueError(
            f"`--prompts` must be a text file in UTF-8, got {str(path)!r} ({error}). Convert it; tables are read as a "
            f"dataset by {hint}."
        ) from error


def _read_whole(path: Path, text: str, first: str, is_json: bool) -> list[Any] | None:
    """The records of a file that is one JSON array or object; `None` for text, and for an object a line."""
    begins_with_record = re.match(r'\s*\[\s*\{\s*"', text) is not None
    if not is_json and not begins_with_record:
        return None
    try:
        is_array = isinstance(parse_json(first), list)
        if not is_array or not (begins_with_record or path.suffix.lower() == ".json"):
            return None
    except ValueError:
        is_array = first.startswith("[")
    try:
        found = parse_json(text)
    except ValueError as error:
        if not is_array:
            return None  # a line that is wrong is named by its number
        raise ValueError(
            f"`--prompts` must be a JSON array where it begins like one, got {str(path)!r} ({error}). Correct it, or "
            "write a JSON object a line."
        ) from error
    return found if isinstance(found, list) else [found]


def _parse(line: str, number: int, path: Path) -> Any:
    try:
        return parse_json(line)
    except ValueError as error:
        reason = getattr(error, "msg", error)
        raise ValueError(
            f"Line {number} of {str(path)!r} must be JSON, got {line[:60]!r} ({reason}). Correct that line."
        ) from error


def _record_of(
    line: _Line,
    path: Path,
    index: int,
    fields: Sequence[str],
    response_field: str = _RESPONSE_FIELD,
    only_text: bool = True,
) -> tuple[Any, Any]:
    """The prompt of a line, and the response if it has one."""
    where = f"prompt {index} ({line.place.lower()} of {str(path)!r})"
    if not line.is_json:
        return line.value, None
    record = line.value
    prompt = response = None
    if isinstance(record, dict):
        prompt = next((record[name] for name in fields if name in record), None)
        response = record.get(response_field)
    if not (prompt.strip() if isinstance(prompt, str) else not only_text and is_prompt(prompt)):
        names = " or ".join(f"`{name}`" for name in fields)
        raise ValueError(
            f"{line.place} of {str(path)!r} must be a JSON object with text in a field {names}, got "
            f"{reprlib.repr(record)}. Correct that {line.place.split()[0].lower()}."
        )
    check_prompt(prompt, where)
    response = response if is_response(response) else None
    if isinstance(response, str):
        check_unicode(response, f"the response to {where}")
    return prompt, response
