"""Texts and JSON that users write: what can be wrong with them is said as a reason, before it fails elsewhere."""

from __future__ import annotations

import codecs
import json
import re
from pathlib import Path
from typing import Any

import numpy as np


# How files that are no plain text begin.
_BINARY = {
    b"\x1f\x8b": "it is compressed by gzip: unpack it first",
    b"BZh": "it is compressed by bzip2: unpack it first",
    b"\xfd7zXZ\x00": "it is compressed by xz: unpack it first",
    b"\x28\xb5\x2f\xfd": "it is compressed by zstd: unpack it first",
    b"PK\x03\x04": "it is a zip archive, as tables of spreadsheets are too: unpack or convert it first",
    b"PAR1": "it is a table in the format of Parquet",
    b"ARROW1": "it is a table in the format of Arrow",
}
# The longer ones first: UTF-32 in this byte order begins as UTF-16 does.
_ENCODINGS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"')
_OPEN, _CLOSE = np.frombuffer(b"[{", dtype=np.uint8), np.frombuffer(b"]}", dtype=np.uint8)
_DEEPEST = 1000
_BYTES_AT_ONCE = 2**24
_SURROGATE = re.compile("[\ud800-\udfff]")


def decode_text(content: bytes) -> str:
    """
    Decode a file of plain text in UTF-8, with or without a byte order mark.

    Args:
        content (`bytes`): what is in the file.

    Returns:
        `str`: without the mark.

    Raises:
        ValueError: for anything else; the message is only the reason.
    """
    for start, reason in _BINARY.items():
        if content.startswith(start):
            raise ValueError(reason)
    for mark, name in _ENCODINGS.items():
        if content.startswith(mark):
            raise ValueError(f"it is in {name}: save it as UTF-8, such as by `iconv -f {name} -t UTF-8`")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{error.reason} at byte {error.start}") from error
    if "\0" in text:
        raise ValueError(f"it holds a zero byte, at character {text.index(chr(0))}, as only binary files do")
    return text


def parse_json(text: str) -> Any:
    """
    Parse JSON of a user.

    Args:
        text (`str`): the JSON.

    Returns:
        `Any`: what it holds.

    Raises:
        ValueError: for what is not JSON, or is nested too deeply for Python's parser.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply; prompts need lists of messages at most") from error


def is_deep(path: Path) -> bool:
    """
    Whether a file of JSON is nested more deeply than any data are. Other parsers than Python's end the process at it.

    Args:
        path (`pathlib.Path`): the file.

    Returns:
        `bool`.
    """
    depth = 0
    with path.open("rb") as file:
        while lines := file.readlines(_BYTES_AT_ONCE):
            marks = np.frombuffer(_STRING.sub(b"", b"".join(lines)), dtype=np.uint8)
            steps = np.isin(marks, _OPEN).astype(np.int64) - np.isin(marks, _CLOSE)
            depths = depth + np.cumsum(steps)
            if depths.max(initial=0) > _DEEPEST:
                return True
            depth = int(depths[-1]) if len(depths) else depth
    return False


def check_unicode(text: str, name: str) -> None:
    """
    Check that a text can be tokenized and written.

    Args:
        text (`str`): the text.
        name (`str`): what to call it, such as `"prompt 3"`.

    Raises:
        ValueError: for a lone surrogate: half of a character, which JSON can escape and no encoding can hold.
    """
    found = _SURROGATE.search(text)
    if found is not None:
        raise ValueError(
            f"A text must be valid Unicode, got the lone surrogate {found.group()!r} at character {found.start()} of "
            f"{name}. It is one half of a character that was cut in two: restore the other half, or take it out with "
            '`text.encode("utf-8", "ignore").decode()`.'
        )
