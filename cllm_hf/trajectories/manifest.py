"""`manifest.json`: what a folder of trajectories holds, and how it was made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


MANIFEST_NAME = "manifest.json"
FORMAT = 1


def read_manifest(folder: Path) -> dict[str, Any]:
    """
    Read the manifest of a folder that `TrajectoryBuilder` has written.

    Args:
        folder (`pathlib.Path`): the folder.

    Returns:
        `dict`: the manifest.

    Raises:
        OSError: if there is none, or it cannot be read.
        ValueError: if it is not JSON, not a manifest of trajectories, or written by a newer version of this package.
    """
    path = folder / MANIFEST_NAME
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"A folder of trajectories must hold `{MANIFEST_NAME}`, got none in {str(folder)!r}. Pass the "
            "`output_dir` of a collection."
        ) from error
    except OSError as error:
        raise OSError(f"{path} must be readable, got: {error.strerror}. Change its permissions.") from error
    except ValueError as error:  # no JSON, or no text at all
        raise ValueError(f"{path} must be JSON, got: {error}. Delete it and run the same collection again.") from error
    version = manifest.get("format") if isinstance(manifest, dict) else None
    if not isinstance(version, int) or not isinstance(manifest.get("shards"), dict):
        raise ValueError(
            f"{path} must be the manifest of a trajectory dataset, with entries `format` and `shards`, got another "
            "file of that name. Pass the `output_dir` of a collection."
        )
    if version > FORMAT:
        raise ValueError(
            f"{path} must have `format` {FORMAT} or older, got {version}. It was written by a newer version: update "
            "with `pip install -U cllm_hf`."
        )
    return manifest
