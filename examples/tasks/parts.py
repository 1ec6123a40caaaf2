"""What the steps of a pipeline leave, and what of it is complete and made with which options."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cllm_hf.files import write_whole


STEPS = ("sft", "collect", "train", "evaluate")


@dataclass(frozen=True)
class Part:
    """
    What a step leaves.

    Attributes:
        name (`str`): its name.
        step (`str`): the step that makes it.
        paths (`tuple[str, ...]`): its folders or files, all there when it is complete.
    """

    name: str
    step: str
    paths: tuple[str, ...]

    @property
    def checkpoints(self) -> str:
        """`str`: folder of what it takes to go on after an interruption; removed when the part is complete."""
        return f"{self.name}-checkpoints"


# In the order in which they are made.
PARTS = {
    part.name: part
    for part in (
        Part("target", "sft", ("target",)),
        Part("draft", "sft", ("draft",)),
        Part("trajectories", "collect", ("trajectories",)),
        Part("cllm", "train", ("cllm",)),
        Part("report", "evaluate", ("report.json", "report.md", "report.png")),
    )
}


class Records:
    """
    Which parts of a folder are complete or begun, with which options: a small file a part in `steps`.

    Args:
        folder (`pathlib.Path`): output folder of the run.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def is_complete(self, part: Part, options: Mapping[str, Any]) -> bool:
        """
        Whether a part is complete.

        Args:
            part (`Part`): the part.
            options (`Mapping[str, Any]`): what it and everything it is made from depend on.

        Returns:
            `bool`: not if it is not there, or only begun.

        Raises:
            ValueError: if it was made, or begun, with other options; or if something else has its place.
        """
        record = self._read(part)
        there = [path for path in part.paths if (self.folder / path).exists()]
        if record is None:
            if there:
                raise ValueError(
                    f"{str(self.folder / there[0])!r} is in the way of the step `{part.step}`, which has not made it. "
                    "Choose another `--output-dir`."
                )
            return False
        if not there and not self._has_checkpoints(part):
            return False  # it was begun and has left nothing, or somebody has removed it
        self._compare(part, record, options)
        return record["is_complete"] and len(there) == len(part.paths)

    def seconds(self, part: Part) -> float | None:
        """How long a part has taken so far, in seconds; `None` if it is not begun."""
        record = self._read(part)
        return None if record is None else record["seconds"]

    def begin(self, part: Part, options: Mapping[str, Any]) -> None:
        """
        Write down that a part is begun, or goes on.

        Args:
            part (`Part`): the part.
            options (`Mapping[str, Any]`): what it depends on.
        """
        record = self._read(part)
        is_same = record is not None and record["options"] == _as_read(options)
        if not is_same or not self._has_checkpoints(part) and not (self.folder / part.paths[0]).exists():
            shutil.rmtree(self.folder / part.checkpoints, ignore_errors=True)  # of what was begun otherwise
            record = None
        self._write(part, options, 0.0 if record is None else record["seconds"], is_complete=False)

    def end(self, part: Part, options: Mapping[str, Any], seconds: float, is_complete: bool) -> None:
        """
        Write down that a part is complete, or was stopped.

        Args:
            part (`Part`): the part.
            options (`Mapping[str, Any]`): what it depends on.
            seconds (`float`): that it has taken, added to those before.
            is_complete (`bool`): whether it is.
        """
        self._write(part, options, (self.seconds(part) or 0.0) + seconds, is_complete)

    def discard(self, step: str) -> list[str]:
        """
        Remove what a step and those after it have made.

        Args:
            step (`str`): one of `STEPS`.

        Returns:
            `list[str]`: names of the parts that were there.
        """
        removed = []
        for part in reversed(PARTS.values()):
            if STEPS.index(part.step) < STEPS.index(step) or self._read(part) is None:
                continue
            for path in (self.folder / name for name in (*part.paths, part.checkpoints)):
                _remove(path)
            self._path(part).unlink()
            removed.append(part.name)
        return removed[::-1]

    def _compare(self, part: Part, record: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        earlier, now = record["options"], _as_read(options)
        for name in [*now, *earlier]:
            if earlier.get(name) == now.get(name):
                continue
            values = [repr(side[name]) if name in side else "the default" for side in (now, earlier)]
            verb = "was made" if record["is_complete"] else "was begun"
            raise ValueError(
                f"`{name}` is {values[0]}, but {part.name!r} in {str(self.folder)!r} {verb} with {values[1]}. Begin "
                f"anew with `--overwrite {part.step}`, which also removes what was made from it, or choose another "
                "`--output-dir`."
            )

    def _has_checkpoints(self, part: Part) -> bool:
        return any((self.folder / part.checkpoints).glob("checkpoint-*"))

    def _write(self, part: Part, options: Mapping[str, Any], seconds: float, is_complete: bool) -> None:
        path = self._path(part)
        path.parent.mkdir(parents=True, exist_ok=True)
        record = {"step": part.step, "is_complete": is_complete, "seconds": seconds, "options": dict(options)}
        write_whole(path, json.dumps(record, indent=2) + "\n")

    def _path(self, part: Part) -> Path:
        return self.folder / "steps" / f"{part.name}.json"

    def _read(self, part: Part) -> dict[str, Any] | None:
        path = self._path(part)
        if not path.is_file():
            return None
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            return {name: record[name] for name in ("is_complete", "seconds", "options")}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{str(path)!r} must be a record of a step, and is damaged. Remove it and the part it is about."
            ) from error


def _remove(path: Path) -> None:
    """Remove a file or folder. If that is interrupted, half a folder does not stand under its name."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    doomed = path.with_name(f".{path.name}.removed")
    if doomed.exists():  # of an earlier interruption
        shutil.rmtree(doomed)
    path.rename(doomed)
    shutil.rmtree(doomed)


def _as_read(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as they are when they have been written and read."""
    return json.loads(json.dumps(dict(options)))
