"""`push_trajectories`: a finished collection onto the Hub, in one commit."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import httpx

from ..files import path_inside, read_text
from ..names import check_repo_id
from .card import DEFAULT_CONFIG, PLOT_NAME, make_card, merge_card, place
from .loading import check_shards, describe_unfinished
from .manifest import (
    MANIFEST_NAME,
    SHARD_NAME,
    check_whole,
    find_problem,
    read_manifest,
    render_manifest,
    without_folders,
)
from .statistics import TrajectoryStatistics


_CARD_NAME = "README.md"
_CONFIG_NAME = re.compile(r"\w[\w.-]*")
_LOG_IN = "Run `hf auth login`, or set `HF_TOKEN`, with a token that may write."


def push_trajectories(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    config_name: str | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> str:
    """
    Upload a finished collection to the Hub: shards, manifest and plot as they are, and a dataset card. The manifest
    goes without the folders of this machine: `path/to/NAME` stands there instead.

    Everything goes into one commit, so that nobody ever sees half of it. Shards of an earlier push of the same
    configuration that are no longer there are deleted in it; other files and other configurations stay. The card tells
    of all configurations in the repository. What others have written into it stays too: a card without our marks keeps
    all its text and metadata and gets ours after it, and of one with marks only what stands between them is replaced,
    because the text of a card is its author's work and ours can be made anew at any time.

    Files of the configuration `"default"` lie at the top of the repository, those of others in a folder of their name,
    in each case just as in `folder`. Shards without records are left out, which `datasets` cannot load.

    Args:
        folder (`str` or `pathlib.Path`): the output folder of a `TrajectoryBuilder`; it is not changed.
        repo_id (`str`): id of the dataset on the Hub, such as `"user/name"`; it is made if there is none.
        private (`bool`, *optional*): whether a new dataset is private; by default as the account's settings say.
        config_name (`str`, *optional*): name of the configuration, for several collections in one dataset.
        token (`str`, *optional*): access token for the Hub; by default the stored one.
        revision (`str`, *optional*): branch to push to, made if there is none; by default the main one.
        commit_message (`str`, *optional*): of the commit.
        create_pr (`bool`): whether to open a pull request instead of changing the branch.

    Returns:
        `str`: address of the dataset, or of the pull request.

    Raises:
        OSError: if the folder is not a collection or has a damaged shard, there is no token or it may not write, or
            the Hub cannot be reached or has changed meanwhile.
        ValueError: if the collection is unfinished, the id or a name is not valid, `private` contradicts an existing
            dataset, or the metadata of its card is not valid.
    """
    folder = Path(folder)
    config_name = DEFAULT_CONFIG if config_name is None else config_name
    _check_config_name(config_name)
    if create_pr and revision not in (None, "main"):
        raise ValueError(f"A pull request is made against the main branch, got `revision` {revision!r}. Drop it.")
    manifest = read_manifest(folder)
    if not manifest.get("complete"):
        raise ValueError(f"{describe_unfinished(folder, manifest)} Push it then.")
    check_whole(folder, manifest)
    check_shards(folder, manifest)
    check_can_push(repo_id, token, create_pr=create_pr, private=private)
    api = HfApi(token=token)
    with _clear_errors(repo_id):
        repo_id = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, repo_type="dataset", exist_ok=True)
        repository = _Repository(api, repo_id, revision)
        additions = _additions(folder, manifest, config_name)
        stale = _stale_shards(repository.files, additions, config_name)
        card = _render_card(repository, manifest, config_name, {*repository.files, *additions})
        commit = api.create_commit(
            repo_id,
            [
                *(CommitOperationAdd(name, content) for name, content in {**additions, _CARD_NAME: card}.items()),
                *(CommitOperationDelete(name) for name in stale),
            ],
            commit_message=commit_message or f"Upload trajectories ({config_name})",
            repo_type="dataset",
            revision=revision,
            create_pr=create_pr,
            parent_commit=repository.commit,
        )
    return commit.pr_url or str(commit.repo_url)


def check_can_push(
    repo_id: str,
    token: str | None = None,
    *,
    create_pr: bool = False,
    private: bool | None = None,
    config_name: str | None = None,
    kind: str = "dataset",
) -> None:
    """
    Check that a dataset or a model (`kind`) can be pushed, before the work that leads to it; the arguments are those
    of `push_trajectories`. Nothing is made or changed on the Hub.

    Raises:
        OSError: if there is no token, it is not valid or may not write there, or the Hub cannot be reached.
        ValueError: for an id or a name that is not valid, or if `private` contradicts an existing dataset.
    """
    if config_name is not None:
        _check_config_name(config_name)
    check_repo_id(repo_id, kind)
    if token is None and get_token() is None:
        raise PermissionError(f"Pushing to {repo_id!r} takes an access token for the Hub, got none. {_LOG_IN}")
    with _clear_errors(repo_id):
        account = HfApi(token=token).whoami()
        if private is not None:
            _check_private(HfApi(token=token), repo_id, private)
    role = account.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise PermissionError(f"Pushing to {repo_id!r} takes a token that may write, got one for reading. {_LOG_IN}")
    namespace = repo_id.split("/")[0] if "/" in repo_id else account["name"]
    names = [account["name"], *(organization["name"] for organization in account.get("orgs", []))]
    # What a fine-grained token may do, and which organizations it shows, is between it and the Hub.
    if role == "write" and not create_pr and namespace not in names:
        raise PermissionError(
            f"`repo_id` must start with your name on the Hub or that of one of your organizations, "
            f"{', '.join(names)}, got {repo_id!r}. Choose another id, or open a pull request with `create_pr=True`."
        )


def _check_config_name(config_name: str) -> None:
    if not _CONFIG_NAME.fullmatch(config_name) or config_name == "data":
        raise ValueError(
            "`config_name` must be made of letters, digits, `_`, `-` and `.`, start with one of the first three, and "
            f"not be 'data', got {config_name!r}. It names a folder of the repository."
        )


def _check_private(api: HfApi, repo_id: str, private: bool) -> None:
    """A dataset that is there keeps its visibility."""
    if not api.repo_exists(repo_id, repo_type="dataset"):
        return
    is_private = bool(api.repo_info(repo_id, repo_type="dataset").private)
    if private != is_private:
        raise ValueError(
            f"`private` must fit the dataset {repo_id!r}, which is already there and is "
            f"{'private' if is_private else 'public'}, got {private}. Nothing was pushed. Leave `private` "
            "out, or change the settings of the dataset on the Hub first."
        )


@contextmanager
def _clear_errors(repo_id: str) -> Iterator[None]:
    """Errors of the Hub and of the way to it, with what can be done."""
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise ConnectionError(
            f"Pushing to {repo_id!r} takes the network, but `HF_HUB_OFFLINE` is set. Unset it and push again."
        ) from error
    except HfHubHTTPError as error:
        raise _explain(repo_id, error) from error
    except (httpx.HTTPError, RuntimeError) as error:
        cause = error if isinstance(error, httpx.HTTPError) else error.__cause__  # uploads wrap their errors
        if isinstance(cause, HfHubHTTPError):
            raise _explain(repo_id, cause) from error
        if not isinstance(cause, httpx.HTTPError):
            raise
        raise ConnectionError(
            f"The Hub did not answer while {repo_id!r} was to be pushed: {cause}. Check the network and push again; "
            "what is in its folder stays there."
        ) from error


def _explain(repo_id: str, error: HfHubHTTPError) -> OSError:
    status, said = error.response.status_code, str(error).strip().splitlines()[0]
    if status in (401, 403):
        return PermissionError(f"The Hub refuses to push to {repo_id!r}: {said} {_LOG_IN}")
    if status == 412:
        return OSError(f"{repo_id!r} was changed by somebody else meanwhile, and nothing was pushed. Push again.")
    return OSError(f"The Hub could not take the push to {repo_id!r}: {said} Nothing was pushed.")


class _Repository:
    """A dataset on the Hub, as it is at one commit."""

    def __init__(self, api: HfApi, repo_id: str, revision: str | None):
        info = api.repo_info(repo_id, repo_type="dataset", revision=revision)
        self.api = api
        self.repo_id = repo_id
        self.commit = info.sha
        self.files = api.list_repo_files(repo_id, repo_type="dataset", revision=self.commit)

    def read(self, name: str) -> str | None:
        if name not in self.files:
            return None
        return read_text(Path(self.api.hf_hub_download(self.repo_id, name, repo_type="dataset", revision=self.commit)))


def _additions(folder: Path, manifest: Mapping[str, Any], config_name: str) -> dict[str, str | bytes]:
    """What to upload: local files by their names in the repository."""
    names = [name for name, entry in manifest["shards"].items() if entry["records"]]
    names += [PLOT_NAME] * path_inside(folder, PLOT_NAME).is_file()
    files: dict[str, str | bytes] = {name: str(path_inside(folder, name)) for name in (*names, MANIFEST_NAME)}
    shown = without_folders(manifest)
    if shown != manifest:
        files[MANIFEST_NAME] = render_manifest(shown)
    return {place(config_name, name): content for name, content in files.items()}


def _stale_shards(files: list[str], additions: Mapping[str, Any], config_name: str) -> list[str]:
    prefix = place(config_name, "")
    shards = [name for name in files if name.startswith(prefix) and SHARD_NAME.fullmatch(name[len(prefix) :])]
    return [name for name in shards if name not in additions]


def _read_other(repository: _Repository, name: str) -> dict[str, Any] | None:
    """The manifest of another configuration; somebody else's file may have that name."""
    try:
        found = json.loads(repository.read(name) or "null")
        if find_problem(found, is_whole=True) is None:
            for values in found["statistics"].values():
                TrajectoryStatistics.from_dict(values)
            return found
    except (ValueError, RecursionError):
        pass
    return None


def _render_card(repository: _Repository, manifest: Mapping[str, Any], config_name: str, files: set[str]) -> bytes:
    manifests = {config_name: manifest}
    for name in repository.files:
        other = DEFAULT_CONFIG if name == MANIFEST_NAME else name.removesuffix(f"/{MANIFEST_NAME}")
        if other not in (name, config_name) and _CONFIG_NAME.fullmatch(other):
            found = _read_other(repository, name)
            if found is not None:
                manifests[other] = found
    plots = [name for name in manifests if place(name, PLOT_NAME) in files]
    card = make_card(manifests, repository.repo_id, plots)
    earlier = repository.read(_CARD_NAME)
    return (card if earlier is None else merge_card(earlier, card)).encode("utf-8", "surrogateescape")
