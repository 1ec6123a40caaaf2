"""Folders and files that are checked before the work and complete after it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def check_writable(folder: Path) -> None:
    """
    Make a folder and check that files can be written into it.

    Args:
        folder (`pathlib.Path`): the folder.

    Raises:
        OSError: if not, saying what to do.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(
            f"The output folder must be writable, got {str(folder)!r} ({error.strerror}). Choose another folder or "
            "change its permissions."
        ) from error


def save_whole(folder: Path, save: Callable[[Path], object]) -> None:
    """
    Save into a folder that appears under its name only when it is complete, in place of an earlier one.

    Args:
        folder (`pathlib.Path`): the folder; its parent exists.
        save (`Callable[[pathlib.Path], object]`): writes everything into the folder it is given.
    """
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as unfinished:
        new = Path(unfinished) / folder.name
        save(new)
        earlier = Path(unfinished) / "earlier"
        try:
            if folder.exists():
                folder.rename(earlier)
            new.rename(folder)
        except BaseException:  # Ctrl-C between the two must not lose both
            if earlier.exists() and not folder.exists():
                earlier.rename(folder)
            raise


def check_writable_file(path: Path) -> None:
    """
    Make the folder of a file and check that the file can be written, or written anew.

    Args:
        path (`pathlib.Path`): the file.

    Raises:
        OSError: if not, saying what to do.
    """
    if path.is_dir():
        raise OSError(f"The output file must be a file, got the folder {str(path)!r}. Name a file in it.")
    check_writable(path.parent)


def write_whole(path: Path, content: str | bytes) -> None:
    """
    Write a file that appears under its name only when it is complete, in place of an earlier one.

    Args:
        path (`pathlib.Path`): the file; its folder exists.
        content (`str` or `bytes`): what to write; a text with its own line ends, as UTF-8.
    """
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as unfinished:
        new = Path(unfinished) / path.name
        new.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(new, path)


def replace_file(path: Path, content: bytes, unfinished: Path | None = None) -> None:
    """
    Write a file that appears under its name only when it is complete and on the disk, in place of an earlier one.

    Unlike `write_whole` it also outlives a loss of power, and what a killed process leaves has a known place.

    Args:
        path (`pathlib.Path`): the file; its folder exists.
        content (`bytes`): what to write.
        unfinished (`pathlib.Path`, *optional*): the file to write first, on the same disk; by default one beside it.

    Raises:
        OSError: if it cannot be written; then there is no unfinished file either.
    """
    unfinished = unfinished or path.with_name(f".{path.name}.tmp")
    try:
        with unfinished.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name
    finally:
        os.close(folder)
