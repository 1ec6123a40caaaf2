"""Folders and files: names that stay inside a folder, checks before the work, and files that are whole after it."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


_LONGEST_NAME = 255  # bytes of a part of a path, on all common file systems
_CACHED_REPOSITORY = re.compile(r"(models|datasets|spaces)--.+")


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


def path_inside(folder: Path, name: object) -> Path:
    """
    Turn a name that was recorded somewhere, as in a manifest or an index of files, into a path inside a folder.

    A record may come from anybody: no name, and no symbolic link that it leads through, may lead out of the folder. In
    the cache of the Hub links lead to the blobs beside the snapshots; those are the files of the folder.

    Args:
        folder (`pathlib.Path`): the folder.
        name (`object`): what was recorded, with `/` between its parts.

    Returns:
        `pathlib.Path`: the path; there need not be anything.

    Raises:
        ValueError: for a name that is not one of a file inside the folder on every system, or a link that leads out.
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
    """
    Say why a recorded name cannot be that of a file inside a folder, on any system.

    Args:
        name (`object`): what was recorded, with `/` between its parts.

    Returns:
        `str`: the problem, as a relative clause; `None` without one.
    """
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
    """
    Check that nothing but a file stands where a file is to be written.

    Args:
        path (`pathlib.Path`): the file, which need not be there.
        remedy (`str`): a sentence that says what to do otherwise.

    Raises:
        OSError: if a folder, a device or the like stands there.
    """
    if os.path.lexists(path) and not path.is_symlink() and not path.is_file():
        kind = "a folder" if path.is_dir() else "no regular file"
        raise OSError(f"{str(path)!r} must be a file, got {kind}. {remedy}")


def save_whole(folder: Path, save: Callable[[Path], object]) -> None:
    """
    Save into a folder that appears under its name only when it is complete, in place of an earlier one.

    Of a process that is killed at any moment the earlier folder or the new one is left: under its name, or beside it
    as `.NAME.earlier`, which the next call puts back.

    Args:
        folder (`pathlib.Path`): the folder; its parent exists.
        save (`Callable[[pathlib.Path], object]`): writes everything into the folder it is given.
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


def read_text(path: Path) -> str | None:
    """
    Read a text that others may have written, such that `write_whole` gives the same bytes.

    Args:
        path (`pathlib.Path`): the file.

    Returns:
        `str`: the text with its own line ends; bytes that are not UTF-8 are lone surrogates. `None` without a file.
    """
    if not path.is_file():
        return None
    return path.read_bytes().decode("utf-8", "surrogateescape")


def write_whole(path: Path, content: str | bytes) -> None:
    """
    Write a file that appears under its name only when it is complete, in place of an earlier one.

    Args:
        path (`pathlib.Path`): the file; its folder exists.
        content (`str` or `bytes`): what to write; a text with its own line ends, as UTF-8.
    """
    replace_file(path, content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content)


def replace_file(path: Path, content: bytes, unfinished: Path | None = None) -> None:
    """
    Write a file that appears under its name only when it is complete and on the disk, in place of an earlier one.

    It outlives a loss of power, and what a killed process leaves has a known place, where the next one writes.

    Args:
        path (`pathlib.Path`): the file; its folder exists.
        content (`bytes`): what to write.
        unfinished (`pathlib.Path`, *optional*): the file to write first, on the same disk; by default one beside it.

    Raises:
        OSError: if it cannot be written; then there is no unfinished file either.
    """
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
