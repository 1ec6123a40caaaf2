"""Local data of tasks, as JSON."""

from __future__ import annotations

import reprlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from cllm_hf.files import decode_text, parse_json


def read_json(path: str | Path) -> Any:
    """
    Read a JSON file.

    Args:
        path (`str` or `pathlib.Path`): the file.

    Returns:
        `Any`: what it holds.

    Raises:
        OSError: if it cannot be read, saying what to do.
        ValueError: if it is not JSON.
    """
    text = _read_text(path)
    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(f"{str(path)!r} must be a JSON file: {error}.") from error


def read_json_rows(path: str | Path, fields: Collection[str] = ()) -> list[dict[str, Any]]:
    """
    Read a file of JSON objects: a list of them, or one a line in a file whose name ends in `.jsonl`.

    Args:
        path (`str` or `pathlib.Path`): the file.
        fields (`Collection[str]`): texts that each object must have.

    Returns:
        `list[dict[str, Any]]`: the objects; empty lines are left out.

    Raises:
        OSError: if it cannot be read, saying what to do.
        ValueError: for what is not such a file, or an object in which a field is missing or no text.
    """
    path = Path(path)
    numbered = list(_read_lines(path) if path.suffix == ".jsonl" else _read_list(path))
    for place, row in numbered:
        if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in fields):
            texts = ", ".join(f"`{name}`" for name in fields)
            what = f"an object with {texts} as text" if fields else "an object"
            raise ValueError(f"{place} of {str(path)!r} must be {what}, got {reprlib.repr(row)}.")
    return [row for _, row in numbered]


def _read_lines(path: Path) -> list[tuple[str, Any]]:
    rows = []
    # Not `splitlines`: texts may hold line ends of other kinds, which JSON need not escape.
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append((f"Line {number}", parse_json(line)))
        except ValueError as error:
            raise ValueError(f"Line {number} of {str(path)!r} must be a JSON object: {error}.") from error
    return rows


def _read_list(path: Path) -> list[tuple[str, Any]]:
    rows = read_json(path)
    if not isinstance(rows, list):
        raise ValueError(f"{str(path)!r} must hold a JSON list of objects, got {reprlib.repr(rows)}.")
    return [(f"Object {number}", row) for number, row in enumerate(rows, 1)]


def _read_text(path: str | Path) -> str:
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise OSError(
            f"The data must be in {str(path)!r}, which cannot be read ({error.strerror}). Name their folder with "
            "`--data`, or leave it out for those of the Hub."
        ) from error
    try:
        return decode_text(content)
    except ValueError as error:
        raise ValueError(f"{str(path)!r} must be a text in UTF-8: {error}.") from error
