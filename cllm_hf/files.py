"""Files: names that stay inside a folder, checks before the work, whole writes, and texts that users write."""

from __future__ import annotations

import codecs
import io
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


_LONGEST_NAME = 255  # bytes of a part of a path, on all common file systems
_CACHED_REPOSITORY = re.compile(r"(models|datasets|spaces)--.+")
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


def check_writable(folder: Path) -> None:
    """Make a folder, and check that files can be written into it; an `OSError` says what to do if not."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(
            f"The output folder must be writable, got {str(folder)!r} ({error.strerror}). Choose another folder or "
            "change its permissions."
        ) from error


def path_inside(folder: Path, name: object) -> Path:
    """
    Turn a name that was recorded somewhere, with `/` between its parts, into a path inside a folder, where there need
    not be anything.

    A record may come from anybody: a `ValueError` for a name, or a symbolic link that it leads through, that leads out
    of the folder. In the cache of the Hub links lead to the blobs beside the snapshots; those are files of the folder.
    """
    problem = problem_of_name(name)
    if problem is None:
        path = folder.joinpath(*str(name).split("/"))
        root, target = (Path(os.path.realpath(one)) for one in (folder, path))
        is_loop = target.is_symlink()
        if not is_loop and target != root and (target.is_relative_to(root) or _is_blob_of(root, target)):
            return path
        problem = f"which is a link to {str(target)!r}"
    raise ValueError(
        f"A name recorded in {str(folder)!r} must be that of a file inside it, got {name!r}, {problem}. Nothing was "
        "read or changed there. Do not use this folder unless you know who wrote it; restore it otherwise."
    )


def problem_of_name(name: object) -> str | None:
    """Why a recorded name cannot be that of a file inside a folder on any system, as a relative clause."""
    if not isinstance(name, str) or not name:
        return "which is not a name"
    if not name.isprintable():
        return "which holds characters that cannot be seen"
    if "\\" in name or ":" in name:
        return "which holds `\\` or `:`"
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts):
        return "which is not a plain relative path"
    if any(part.endswith((" ", ".")) or len(part.encode()) > _LONGEST_NAME for part in parts):
        return "which not every system can hold"
    return None


def _is_blob_of(snapshot: Path, target: Path) -> bool:
    """Whether a file is one of those that a snapshot in the cache of the Hub links to: `REPOSITORY/blobs`, `blobs`."""
    for folder in (snapshot, *snapshot.parents):
        repository = folder.parent.parent
        if folder.parent.name == "snapshots" and _CACHED_REPOSITORY.fullmatch(repository.name):
            return repository / "blobs" == target.parent or repository.parent / "blobs" == target.parent.parent
    return False


def check_file_place(path: Path, remedy: str) -> None:
    """Check that a regular file or nothing is at a path; the `OSError` ends in `remedy`, a sentence."""
    if os.path.lexists(path) and not path.is_symlink() and not path.is_file():
        kind = "a folder" if path.is_dir() else "no regular file"
        raise OSError(f"{str(path)!r} must be a file, got {kind}. {remedy}")


def save_whole(folder: Path, save: Callable[[Path], object]) -> None:
    """
    Save into a folder, by `save`, that appears under its name only when it is complete, in place of an earlier one.

    Of a process that is killed at any moment the earlier folder or the new one is left: under its name, or beside it
    as `.NAME.earlier`, which the next call puts back.
    """
    new, earlier = (folder.with_name(f".{folder.name}.{kind}") for kind in ("new", "earlier"))
    if os.path.lexists(earlier) and not os.path.lexists(folder):  # killed between the two renames
        earlier.rename(folder)
    try:
        _clear(new)
        _clear(earlier)
        save(new)
        if os.path.lexists(folder):
            folder.rename(earlier)
        new.rename(folder)
    except BaseException:  # Ctrl-C between the two must not lose both
        if os.path.lexists(earlier) and not os.path.lexists(folder):
            earlier.rename(folder)
        raise
    finally:
        _clear(new)
        if os.path.lexists(folder):
            _clear(earlier)


def _clear(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_writable_file(path: Path) -> None:
    """Make the folder of a file, and check that the file can be written; an `OSError` says what to do if not."""
    if path.is_dir():
        raise OSError(f"The output file must be a file, got the folder {str(path)!r}. Name a file in it.")
    check_writable(path.parent)


def read_text(path: Path) -> str | None:
    """
    Read a text that others may have written, such that `write_whole` gives the same bytes: its line ends stay, and
    bytes that are not UTF-8 are lone surrogates. `None` without a file.
    """
    if not path.is_file():
        return None
    return path.read_bytes().decode("utf-8", "surrogateescape")


def write_whole(path: Path, content: str | bytes, unfinished: Path | None = None) -> None:
    """
    Write a file, a text as UTF-8, that appears under its name only when it is complete and on the disk.

    It outlives a loss of power, and what a killed process leaves has a known place, where the next one writes:
    `unfinished`, on the same disk, by default beside the file. If the file cannot be written, neither is left.
    """
    content = content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content
    unfinished = unfinished or path.with_name(f".{path.name}.tmp")
    unfinished.unlink(missing_ok=True)
    try:
        with unfinished.open("xb") as file:  # never through a link that somebody has put there
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name
    finally:
        os.close(folder)


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure of matplotlib as a PNG file; the same figure gives the same bytes."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None})
    write_whole(path, picture.getvalue())


def decode_text(content: bytes) -> str:
    """Decode a file of plain text in UTF-8; a `ValueError` for anything else says only the reason."""
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
    """Parse JSON of a user; a `ValueError` also for what is nested too deeply for Python's parser."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply; prompts need lists of messages at most") from error


def is_deep(path: Path) -> bool:
    """
    Whether a file of JSON is nested more deeply than any data are. Other parsers than Python's end the process at it.
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
    Check that a text, which an error calls `name`, can be tokenized and written: a lone surrogate is half of a
    character, which JSON can escape and no encoding can hold.
    """
    found = _SURROGATE.search(text)
    if found is not None:
        raise ValueError(
            f"A text must be valid Unicode, got the lone surrogate {found.group()!r} at character {found.start()} of "
            f"{name}. It is one half of a character that was cut in two: restore the other half, or take it out with "
            '`text.encode("utf-8", "ignore").decode()`.'
        )
