"""
What a model or a dataset is called: the path of a folder or file on this machine, or an id on the Hub.

Which of the two a name is, is decided here and nowhere else.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


# A name that begins so is a path, whether or not there is anything.
_PATH_STARTS = ("/", ".", "~")
# The whole path of a folder, on this system or another one.
_ABSOLUTE = re.compile(r"[/~\\]|file:|[A-Za-z]:[\\/]")
_FILE_ENDINGS = (".json", ".jsonl", ".txt", ".csv", ".tsv", ".parquet", ".arrow", ".md", ".gz", ".zst")


@dataclass(frozen=True)
class Name:
    """The name of a model or a dataset: it has a path or an id on the Hub, or neither if it can be neither."""

    text: str  # as it was given
    path: Path | None = None  # where the folder or file is, or would be if it was there
    hub_id: str | None = None

    @classmethod
    def find(cls, name: str | Path) -> Name:
        """
        Decide what a name is that something is to be loaded by, with a look at this machine.

        A `Path` is a path, and so is a text that is written as one, is one word that ends as the name of a file, or
        whose folder or file is there. Any other text is an id if the Hub allows it.
        """
        text = str(name)
        is_file_name = "/" not in text and text.lower().endswith(_FILE_ENDINGS)
        is_written_so = text.startswith(_PATH_STARTS) or is_file_name
        if isinstance(name, Path) or is_written_so or (text and Path(text).exists()):
            return cls(text, path=Path(text))
        return cls(text, hub_id=text if _problem_of(text) is None else None)

    @classmethod
    def recorded(cls, name: str | None) -> Name:
        """
        Decide what a name is by its spelling alone: it was recorded somewhere, and others are to read it.

        An id needs its owner here, as a single word may be a folder just as well. Where the spelling leaves it open,
        the name has neither path nor id.
        """
        text = name or ""
        is_address = "://" in text and not text.startswith("file:")
        has_folders = "\\" in text or (text.count("/") > 1 and not is_address)
        if text.startswith(_PATH_STARTS) or is_absolute(text) or has_folders:
            return cls(text, path=Path(text))
        is_id = text.count("/") == 1 and not text.lower().endswith(_FILE_ENDINGS) and _problem_of(text) is None
        return cls(text, hub_id=text if is_id else None)

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder of this machine."""
        return self.path is not None and self.path.is_dir()

    @property
    def is_missing(self) -> bool:
        """Whether it is a path at which there is nothing."""
        return self.path is not None and not self.path.exists()

    @property
    def full(self) -> str:
        """The name by which it is found from any folder: the whole path, or the name as it is."""
        return self.text if self.path is None else str(self.path.resolve())

    @property
    def short(self) -> str:
        """The last part of a path; any other name as it is."""
        return self.text if self.path is None else self.path.resolve().name

    @property
    def for_others(self) -> str:
        """The name without the folders of the machine where it was recorded, which mean nothing to others."""
        return self.text if self.path is None else "path/to/" + re.split(r"[\\/]", str(self.path))[-1]

    def check(self, option: str, kind: str, takes_files: bool = False) -> None:
        """
        Check that there can be something of this name, before it is looked for on the Hub: a path needs a folder, and
        any other text must be an id. The error names the `option` and the `kind`, "model" or "dataset".
        """
        if (
            self.hub_id is not None
            or self.is_folder
            or (takes_files and self.path is not None and self.path.is_file())
        ):
            return
        if self.path is None:
            problem = "which is not there and cannot be an id"
        else:
            problem = "which is not there" if self.is_missing else "which is a file"
        places = "a folder, a file" if takes_files else "a folder"
        raise FileNotFoundError(
            f"`{option}` must be {places}, or the id of a {kind} on the Hub such as 'user/name', got {self.text!r}, "
            f"{problem}. Check the name."
        )

    def check_hub_options(self, revision: str | None, token: str | None) -> None:
        """Check that what only the Hub takes is not passed for a folder."""
        if self.path is not None and (revision is not None or token is not None):
            raise ValueError(f"{self.text} is a folder, got `revision` or `token` for the Hub too. Drop them.")


def is_absolute(text: str) -> bool:
    """Whether a text is spelled as a path that tells the folders of a machine, on this system or another one."""
    return _ABSOLUTE.match(text) is not None


def check_repo_id(repo_id: str, kind: str) -> None:
    """
    Check the id of a repository of a "model" or a "dataset" that is to be written to: there a name is an id, whatever
    lies on this machine.
    """
    problem = _problem_of(repo_id)
    if problem is not None:
        raise ValueError(
            f"`repo_id` must be the id of a {kind} on the Hub, such as 'user/name', got {repo_id!r}: {problem}"
        )


def _problem_of(repo_id: str) -> str | None:
    """Why the Hub does not allow an id."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        return str(error)
    return None
