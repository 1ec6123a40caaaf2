"""The folder that a collection is written to: finished shards, a manifest, and what an unfinished shard has so far."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
from filelock import FileLock, Timeout

from ..files import check_file_place, check_writable, path_inside, read_text, write_whole
from ..process import Process
from .card import PLOT_NAME, make_card, merge_card
from .loading import MAKE_ANEW, UNFINISHED_NAME, check_shards
from .manifest import (
    MANIFEST_NAME,
    check_whole,
    describe_difference,
    has_no_states,
    read_manifest,
    render_manifest,
)
from .shard import Journal, explain_none_left, read_notes, to_parquet
from .statistics import TrajectoryStatistics, plot_statistics


logger = logging.getLogger(__name__)
DATA, CARD_NAME = "data", "README.md"
_PNG = b"\x89PNG\r\n\x1a\n"
_WAIT_SECONDS = 0.5
_OF_MODELS = ("config.json", "adapter_config.json")
_IN_THE_WAY = "Remove it and run the same collection again, or choose another `output_dir`."


class OutputFolder:
    """
    A folder of trajectories, from the first shard to the card.

    A shard is a file for each split, of the records of `prompts_per_shard` consecutive prompts. It appears under its
    name when it is complete, so what is there is finished, and what is not is made by the next run. All else is
    derived from the shards: each says in its footer what was counted and measured while it was made.

    `header` are the parts of the manifest that say what is collected, by which model and how. Of several processes
    each makes every `process.count`-th shard.

    Raises:
        OSError: if the folder is not writable, another run is writing into it, a finished shard is damaged, or
            something else stands where a file or folder of a collection goes.
        ValueError: if it holds something else, a collection of other prompts, options or another model, or symbolic
            links that lead out of it.
    """

    def __init__(self, path: Path, header: dict[str, Any], splits: tuple[str, ...], process: Process):
        self.path = path
        self.header = header
        self.splits = splits
        self.process = process
        self._count = header["prompts"]["count"]
        self._per_shard = header["options"]["prompts_per_shard"]
        self._has_states = not has_no_states(header)
        self.num_shards = -(-self._count // self._per_shard)
        self._entries: dict[int, dict[str, Any]] = {}
        if process.count > self.num_shards:
            logger.warning(
                "%d processes share %d shards, and some have nothing to do. Lower `prompts_per_shard`.",
                process.count,
                self.num_shards,
            )
        self._lock = FileLock(path / UNFINISHED_NAME / f"process-{process.index}.lock", timeout=0)
        check_writable(path)
        self._check_places()
        self._check_earlier()

    def __enter__(self) -> OutputFolder:
        for folder in (DATA, UNFINISHED_NAME):
            (self.path / folder).mkdir(exist_ok=True)
        try:
            self._lock.acquire()
        except Timeout as error:
            raise OSError(
                f"Another run is writing into {str(self.path)!r}. Wait for its end, or choose another `output_dir`."
            ) from error
        try:
            with self.explained_errors():
                self._write_manifest(complete=False)
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._lock.release()
        self.tidy()

    def tidy(self) -> None:
        """Remove what unfinished shards had, once there is none."""
        if self.is_complete():
            shutil.rmtree(self.path / UNFINISHED_NAME, ignore_errors=True)

    def lock_shard(self, number: int) -> FileLock:
        """What a process holds while it makes a shard, in case another run divides the work differently."""
        return FileLock(self.path / UNFINISHED_NAME / f"shard-{number:05d}.lock")

    def is_complete(self) -> bool:
        """Whether nothing is left to do."""
        card, plot = self.path / CARD_NAME, self.path / PLOT_NAME
        if not self._has_manifest() or self._missing() or not (read_text(card) or "").strip():
            return False
        if self._has_states and not (plot.is_file() and plot.read_bytes().startswith(_PNG)):
            return False
        manifest = read_manifest(self.path)
        return manifest["complete"] and manifest["prompts"] == self.header["prompts"]

    def own_shards(self) -> list[int]:
        """The shards that this process makes and that are not there yet."""
        return [number for number in self._missing() if number % self.process.count == self.process.index]

    def prompts_of(self, number: int) -> range:
        """The places of the prompts of a shard."""
        return range(number * self._per_shard, min((number + 1) * self._per_shard, self._count))

    def journal(self, number: int) -> Journal:
        """The journal of an unfinished shard."""
        return Journal(self.path / UNFINISHED_NAME / f"shard-{number:05d}")

    def write_shard(
        self, number: int, tables: Mapping[str, pa.Table], counts: Mapping[str, int], statistics: Mapping[str, Any]
    ) -> None:
        """Write a shard, with its counts and the `TrajectoryStatistics.to_dict()` of each split; drop its journal."""
        notes = {"shard": number, "counts": dict(counts), "statistics": dict(statistics)}
        for split in reversed(self.splits):  # the first split is written last: with it the shard is complete
            self._replace(self._name(split, number), to_parquet(tables[split], notes))
        self.journal(number).clear()
        if self.process.is_first:
            self._write_manifest(complete=False)

    @contextmanager
    def explained_errors(self) -> Iterator[None]:
        """Say of an error of the file system within the context what is kept and how to go on."""
        try:
            yield
        except OSError as error:
            done = self.num_shards - len(self._missing())
            raise OSError(
                f"The collection stopped: {error.strerror or error}. {done} of {self.num_shards} shards in "
                f"{str(self.path)!r} are finished and whole. Make room or repair the disk, and run the same "
                "collection again: it goes on there."
            ) from error

    def finish(self, wait: bool) -> bool:
        """
        Merge the shards of all processes into the plot, the card and the last manifest; say whether that is done.

        The first process does it when it has waited for the others. Where nobody waits, the last one to finish does.

        Raises:
            OSError: if it cannot be written, or a shard is damaged.
            ValueError: if no record is left.
        """
        if wait and self._missing():
            logger.warning(
                "Waiting for %d shards of other processes. By `RANK` and `WORLD_SIZE` this is process %d of %d; if "
                "there are no others, unset both, or pass `wait=False`.",
                len(self._missing()),
                self.process.index,
                self.process.count,
            )
        while wait and not self.is_complete() and (self._missing() or not self.process.is_first):
            if not self._missing():
                _check_kept(self._manifest(complete=True))  # the process that merges has no more to wait for
            time.sleep(_WAIT_SECONDS)
        if self.is_complete() and not self.process.is_first:
            return True
        if self._missing():
            return False
        # Of processes that do not wait, two may be the last.
        with FileLock(self.path / UNFINISHED_NAME / "merge.lock"):
            if not self.is_complete():
                self._merge()
        return True

    def _merge(self) -> None:
        manifest = self._manifest(complete=True)
        _check_kept(manifest)
        statistics = {name: TrajectoryStatistics.from_dict(values) for name, values in manifest["statistics"].items()}
        if self._has_states:
            plot = self.path / UNFINISHED_NAME / PLOT_NAME
            plot_statistics(statistics, plot)
            os.replace(plot, self.path / PLOT_NAME)
        card, earlier = make_card({"default": manifest}, None), read_text(self.path / CARD_NAME)
        if earlier is not None:  # of an earlier end: what others have written into it stays
            card = merge_card(earlier, card)
        self._replace(CARD_NAME, card)
        self._replace(MANIFEST_NAME, render_manifest(manifest))

    def _manifest(self, complete: bool) -> dict[str, Any]:
        """The manifest of the shards that are there."""
        shards: dict[str, Any] = {}
        counts: Counter[str] = Counter()
        done = 0
        statistics: dict[str, TrajectoryStatistics] = {}
        if self._has_states:
            size = self.header["options"]["block_size"]
            statistics = {split: TrajectoryStatistics(size) for split in self.splits}
        for number in sorted(set(range(self.num_shards)) - set(self._missing())):
            entry = self._entries.get(number) or self._read_entry(number)
            self._entries[number] = entry
            shards.update(entry["files"])
            counts.update(entry["counts"])
            for split, values in entry["statistics"].items():
                statistics[split] += TrajectoryStatistics.from_dict(values)
            done += len(self.prompts_of(number))
        return {
            **self.header,
            "complete": complete,
            "prompts_done": done,
            "counts": dict(sorted(counts.items())),
            "statistics": {split: values.to_dict() for split, values in statistics.items()},
            "shards": dict(sorted(shards.items())),
        }

    def _write_manifest(self, complete: bool) -> None:
        # The other processes write nothing but their shards.
        if self.process.is_first or not self._has_manifest():
            self._replace(MANIFEST_NAME, render_manifest(self._manifest(complete)))

    def _replace(self, name: str, content: str | bytes) -> None:
        """Write a file, first where no other process writes it and what a killed one leaves is removed at the end."""
        unfinished = self.path / UNFINISHED_NAME / f"{self.process.index}-{Path(name).name}"
        write_whole(self.path / name, content, unfinished)

    def _read_entry(self, number: int) -> dict[str, Any]:
        files = {}
        for split in self.splits:
            name = self._name(split, number)
            content = (self.path / name).read_bytes()
            try:
                num_records, notes = read_notes(content, number)
            except ValueError as error:
                raise OSError(f"Shard {name} of {str(self.path)!r} cannot be read ({error}). {MAKE_ANEW}") from error
            digest = hashlib.sha256(content).hexdigest()
            files[name] = {"records": num_records, "bytes": len(content), "sha256": digest}
        return {"files": files, "counts": notes["counts"], "statistics": notes["statistics"]}

    def _check_places(self) -> None:
        """Check that what is written, read and removed is inside the folder, and that nothing else is in its place."""
        for name in (DATA, UNFINISHED_NAME):
            place = path_inside(self.path, name)
            if os.path.lexists(place) and not place.is_dir():
                raise OSError(f"{str(place)!r} must be a folder, got something else. {_IN_THE_WAY}")
        for path in (self.path / UNFINISHED_NAME).rglob("*"):  # nothing there is ever made as a link
            if path.is_symlink():
                raise ValueError(f"{str(path)!r} must be a file of a collection, got a symbolic link. {_IN_THE_WAY}")
        shards = [self._name(split, number) for split in self.splits for number in range(self.num_shards)]
        for name in (MANIFEST_NAME, CARD_NAME, PLOT_NAME, *shards):
            check_file_place(path_inside(self.path, name), _IN_THE_WAY)

    def _check_earlier(self) -> None:
        """Compare with what an earlier run has left there."""
        if not self._has_manifest():
            model = next((name for name in _OF_MODELS if (self.path / name).is_file()), None)
            if model:
                raise ValueError(
                    f"A dataset must have a folder of its own, got {str(self.path)!r}, which holds a model "
                    f"({model}). Choose another `output_dir`."
                )
            if any((self.path / DATA).glob("*.parquet")):
                raise ValueError(
                    f"{str(self.path)!r} holds parquet files, but no `{MANIFEST_NAME}` that says what they are. "
                    "Choose another `output_dir`."
                )
            return
        earlier = read_manifest(self.path)
        check_whole(self.path, earlier)
        difference = describe_difference(earlier, self.header)
        if difference and _has_nothing(earlier):  # and so nothing is lost: its prompts all were dropped
            for name in earlier["shards"]:
                path_inside(self.path, name).unlink(missing_ok=True)
            (self.path / MANIFEST_NAME).unlink()
            return
        if difference:
            raise ValueError(
                f"{str(self.path)!r} holds another collection: {difference}. Choose another `output_dir`, or pass "
                "what that one was begun with, which continues it."
            )
        prompts = dict(self.header["prompts"])
        for name in ("source", "license"):  # said once, they stay
            prompts[name] = prompts[name] or earlier["prompts"].get(name)
        self._warn_of_near_ties(earlier)
        # The versions are those that it was begun with.
        self.header = {**self.header, "prompts": prompts, "made_with": earlier["made_with"]}
        there = {name: entry for name, entry in earlier["shards"].items() if path_inside(self.path, name).is_file()}
        check_shards(self.path, {"shards": there})

    def _warn_of_near_ties(self, earlier: Mapping[str, Any]) -> None:
        """Of what may change the rounding: where two tokens tie, other records come out than at the beginning."""
        budgets = [manifest["options"].get("max_tokens_per_batch") for manifest in (earlier, self.header)]
        if not earlier["complete"] and (earlier["made_with"] != self.header["made_with"] or budgets[0] != budgets[1]):
            logger.warning(
                "The collection in %s was begun with %s and `max_tokens_per_batch=%s`, and goes on with %s and "
                "`max_tokens_per_batch=%s`: where two tokens are equally good, its records may differ.",
                self.path,
                earlier["made_with"],
                budgets[0],
                self.header["made_with"],
                budgets[1],
            )

    def _has_manifest(self) -> bool:
        return (self.path / MANIFEST_NAME).is_file()

    def _missing(self) -> list[int]:
        data = self.path / DATA
        names = {name for name in os.listdir(data) if (data / name).is_file()} if data.is_dir() else set()
        files = {n: {Path(self._name(split, n)).name for split in self.splits} for n in range(self.num_shards)}
        return [n for n, wanted in files.items() if not wanted <= names]

    def _name(self, split: str, number: int) -> str:
        return f"{DATA}/{split}-{number:05d}-of-{self.num_shards:05d}.parquet"


def _has_nothing(manifest: Mapping[str, Any]) -> bool:
    return manifest["prompts_done"] == manifest["prompts"]["count"] and not manifest["counts"].get("kept")


def _check_kept(manifest: Mapping[str, Any]) -> None:
    if not manifest["counts"].get("kept"):
        raise ValueError(explain_none_left(manifest["prompts"]["count"], manifest["counts"]))
