"""What a work that may be killed has finished, kept so that the same work goes on there."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .files import check_file_place, path_inside, write_whole


logger = logging.getLogger(__name__)


class Journal:
    """
    Results of finished parts of a work, one file each, so that a killed run continues there; without a folder nothing
    is kept.

    A file appears under its name when it is complete. It says what it is the result of; one that is of something else,
    as another version of this package may leave it, or that was cut, is computed again. It carries a digest of its
    content: one that holds other bytes than were written, or none by which that could be told, as version 0.1.0
    left it, is named in a warning and computed again.
    """

    def __init__(self, folder: Path | None = None, depends: Any = None):
        """`depends`, as JSON has it, is what all results depend on beside the key of each."""
        self.folder, self._depends = folder, depends

    def once(self, name: str, key: Any, compute: Callable[[], Any]) -> Any:
        """
        The result of a part: read, if an earlier run has computed it, otherwise computed and kept.

        Args:
            name (`str`): of the part, a file name.
            key (`Any`): what it is the result of, as JSON has it.
            compute (`Callable[[], Any]`): returns lists, dicts, texts and numbers, as JSON has them.
        """
        if self.folder is None:
            return compute()
        path, of = self._path(name), self._digest_of(key)
        kept, problem = _read(path)
        if kept.get("of") == of and problem is None:
            return kept["result"]
        if problem is not None:
            logger.warning("%s %s. What it is the result of is computed again.", path, problem)
        result = compute()
        content = {"of": of, "digest": _digest([of, result]), "result": result}
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(content, separators=(",", ":")).encode())
        return result

    def has(self, name: str, key: Any) -> bool:
        """Whether `once` would read the result."""
        if self.folder is None:
            return False
        kept, problem = _read(self._path(name))
        return problem is None and kept.get("of") == self._digest_of(key)

    def clear(self) -> None:
        """Remove the files: the work is done."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, name: str) -> Path:
        path = path_inside(self.folder or Path(), f"{name}.json")
        check_file_place(path, "Remove it and run the same command again.")
        return path

    def _digest_of(self, key: Any) -> str:
        return _digest(key if self._depends is None else [self._depends, key])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _read(path: Path) -> tuple[dict[str, Any], str | None]:
    """What a file holds, nothing if it is not there; and what is wrong with it."""
    try:
        kept = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}, None
    except (ValueError, RecursionError):
        return {}, "was cut, or holds other bytes than were written"
    if not isinstance(kept, dict) or "digest" not in kept:
        return {}, "has no digest of its content, as an earlier version left it"
    if kept["digest"] != _digest([kept.get("of"), kept.get("result")]):
        return {}, "holds other bytes than were written"
    return kept, None
