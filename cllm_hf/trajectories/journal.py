"""What a collection has computed of an unfinished shard, kept so that a killed run continues there."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..files import replace_file


class Journal:
    """
    Results of the finished batches of a shard, one file each.

    A file appears under its name when it is complete. It says what it is the result of; one that is of something else,
    as another version of this package may leave it, or that cannot be read, is computed again.

    Args:
        folder (`pathlib.Path`, *optional*): where the files are; without one nothing is kept.
    """

    def __init__(self, folder: Path | None = None):
        self.folder = folder

    def once(self, name: str, key: Any, compute: Callable[[], Any]) -> Any:
        """
        The result of a batch: read, if an earlier run has computed it, otherwise computed and kept.

        Args:
            name (`str`): of the batch, a file name.
            key (`Any`): what it is the result of, as JSON has it.
            compute (`Callable[[], Any]`): returns lists, dicts, texts and numbers, as JSON has them.

        Returns:
            What `compute` returns, or returned then.

        Raises:
            OSError: if it cannot be kept.
        """
        if self.folder is None:
            return compute()
        path = self.folder / f"{name}.json"
        digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
        try:
            kept = json.loads(path.read_bytes())
            if isinstance(kept, dict) and kept.get("of") == digest:
                return kept["result"]
        except (FileNotFoundError, ValueError):
            pass
        result = compute()
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps({"of": digest, "result": result}, separators=(",", ":")).encode())
        return result

    def clear(self) -> None:
        """Remove the files: the shard is written."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
