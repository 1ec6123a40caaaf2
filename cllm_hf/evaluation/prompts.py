"""Prompts from a file: a line each, as text or as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


_FIELDS = ("prompt", "question")


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
    is_json = path.suffix == ".jsonl" or lines[0][1].startswith("{")
    lines = lines[:limit]
    return [_prompt_of(line, path, number) for number, line in lines] if is_json else [line for _, line in lines]


def _prompt_of(line: str, path: Path, number: int) -> str:
    where = f"Line {number} of {str(path)!r}"
    try:
        record: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} must be JSON, got {line[:60]!r} ({error.msg}). Correct that line.") from error
    prompt = None
    if isinstance(record, dict):
        prompt = next((record[name] for name in _FIELDS if name in record), None)
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(
            f"{where} must be a JSON object with text in a field `prompt` or `question`, got {line[:60]!r}. Correct "
            "that line."
        )
    return prompt
