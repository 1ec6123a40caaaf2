"""
Jacobi decoding for people who have not installed this package: `custom_generate/generate.py` beside a saved model.

transformers runs such a file in place of `generate` when a model is loaded with `trust_remote_code=True`, or when
`generate(custom_generate=...)` names the folder. The file is put together from this package's own modules, so that it
decodes, refuses and counts exactly as `import cllm_hf` does. That of a lossless adapter loads the drafter as well.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, ModelCardData
from huggingface_hub.utils import httpx

from .blocks.drafter import DRAFTER_FILE, NEVER_INVOKED
from .cards import plain, quoted
from .exported import MARK, marked, render_generate
from .files import check_file_place, check_writable, path_inside, read_text, write_whole
from .names import Name
from .options import JACOBI, LOSSLESS, check_block_size


# Lower bounds as in `pyproject.toml`; the host compares one bound a line and installs nothing.
REQUIREMENTS = ("torch>=2.6", "transformers>=5.20")
_OF_ADAPTERS = ("peft>=0.20",)
TAG = "custom_generate"
_GENERATE = "custom_generate/generate.py"
_REQUIREMENTS = "custom_generate/requirements.txt"
_CARD = "README.md"


class _Folder:
    """A folder of a saved model."""

    def __init__(self, path: Path):
        self.path = path
        self.name = str(path)
        self.title = path.resolve().name

    def read(self, name: str) -> str | None:
        return read_text(self.path / name)

    def has(self, name: str) -> bool:
        return (self.path / name).is_file()

    def check(self) -> None:
        for name in (_REQUIREMENTS, _GENERATE, _CARD):
            check_file_place(path_inside(self.path, name), "Remove it and export again.")

    def write(self, files: dict[str, str]) -> str:
        check_writable(self.path)
        (self.path / _GENERATE).parent.mkdir(exist_ok=True)  # may hold files of others
        for name in (_REQUIREMENTS, _GENERATE, _CARD):  # what is called comes after what it needs
            write_whole(self.path / name, files[name])
        return str(self.path / _GENERATE)


class _Repository:
    """A model on the Hub."""

    def __init__(self, repo_id: str, revision: str | None, token: str | None):
        self.name = self.title = repo_id
        self.revision = revision
        self.api = HfApi(token=token)
        self.files = set(self.api.list_repo_files(repo_id, revision=revision))

    def read(self, name: str) -> str | None:
        if name not in self.files:
            return None
        return read_text(Path(self.api.hf_hub_download(self.name, name, revision=self.revision)))

    def has(self, name: str) -> bool:
        return name in self.files

    def check(self) -> None:
        pass  # a repository holds what it holds

    def write(self, files: dict[str, str]) -> str:
        commit = self.api.create_commit(
            self.name,
            [CommitOperationAdd(name, text.encode("utf-8", "surrogateescape")) for name, text in files.items()],
            commit_message="Add Jacobi decoding as `custom_generate`",
            revision=self.revision,
        )
        return commit.commit_url


def _open_place(folder_or_repo: str | Path, revision: str | None, token: str | None) -> _Folder | _Repository:
    found = Name.find(folder_or_repo)
    found.check("folder_or_repo", "model")
    if found.path is not None:
        found.check_hub_options(revision, token)
        return _Folder(found.path)
    try:
        return _Repository(found.text, revision, token)
    except (httpx.HTTPError, OSError, ValueError) as error:
        raise FileNotFoundError(
            f"`folder_or_repo` must be a folder, or the id of a model on the Hub, got {found.text!r} "
            f"({str(error).strip().splitlines()[0]}). Check the name."
        ) from error


def export_custom_generate(
    folder_or_repo: str | Path,
    block_size: int | str | None = None,
    overwrite: bool = False,
    revision: str | None = None,
    token: str | None = None,
) -> str:
    """
    Put Jacobi decoding beside a saved model, for people who have not installed this package.

    Writes `custom_generate/generate.py` and `custom_generate/requirements.txt`, and adds the tag `custom_generate` to
    the model card, which is made if there is none. `AutoModelForCausalLM.from_pretrained(folder,
    trust_remote_code=True)` then decodes by Jacobi. An adapter is loaded without such files; there, pass
    `generate(custom_generate=folder, trust_remote_code=True)`. With a lossless adapter, that drafts.

    Args:
        folder_or_repo (`str` or `pathlib.Path`): folder of a saved model or adapter, or its id on the Hub, which gets
            all files in one commit.
        block_size (`int` or `"auto"`, *optional*): `jacobi_block_size` where neither a call nor a generation config
            has one. By default that of the folder's `generation_config.json`, or else the package's default.
        overwrite (`bool`): whether to replace a `custom_generate` that was not written by this function.
        revision (`str`, *optional*): branch of the Hub repository.
        token (`str`, *optional*): access token for the Hub; by default the stored one.

    Returns:
        `str`: path of the written `generate.py`, or address of the commit.

    Raises:
        OSError: if there is neither a folder nor a repository of that name, it holds no model and no adapter, or a
            lossless adapter without its drafter, or it cannot be written.
        RuntimeError: if this package's modules cannot be put into one file.
        ValueError: if `block_size` is not valid, a foreign `custom_generate` stands in the way, the model card has
            invalid metadata, a symbolic link leads out of the folder, or `revision` or `token` is given for a folder.
    """
    place = _open_place(folder_or_repo, revision, token)
    is_adapter = place.read("adapter_config.json") is not None
    if not is_adapter and place.read("config.json") is None:
        raise FileNotFoundError(
            f"{place.name} must hold a saved model or adapter, got neither `config.json` nor `adapter_config.json` in "
            "it. Save the model there first, with `save_pretrained` or `CLLMTrainer.save_model`."
        )
    is_lossless = is_adapter and _is_lossless(place)
    place.check()
    for name in (_GENERATE, _REQUIREMENTS):
        if not overwrite and not (place.read(name) or MARK).startswith(MARK):
            raise ValueError(
                f"{name} of {place.name} was not written by `export_custom_generate`, got another file of that name. "
                "Pass `overwrite=True` to replace it."
            )
    return place.write(
        {
            _GENERATE: render_generate(_choose_block_size(place, block_size), LOSSLESS if is_lossless else JACOBI),
            _REQUIREMENTS: "\n".join(
                [marked("requirements"), *REQUIREMENTS, *(_OF_ADAPTERS if is_lossless else ()), ""]
            ),
            _CARD: _render_card(place, is_adapter, is_lossless),
        }
    )


def _is_lossless(place: _Folder | _Repository) -> bool:
    """Whether a place holds a lossless adapter, and its drafter too."""
    try:
        tokens = json.loads(place.read("adapter_config.json") or "").get("alora_invocation_tokens")
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"`adapter_config.json` of {place.name} must be an object of JSON, got: {error}. Save the adapter again."
        ) from error
    if tokens != NEVER_INVOKED:
        return False
    if not place.has(DRAFTER_FILE):
        raise FileNotFoundError(
            f"A lossless adapter must have its drafter beside it, got {place.name} without {DRAFTER_FILE}. Save the "
            "adapter with `CLLMTrainer.save_model`, or copy that file from where it was saved."
        )
    return True


def is_exported(folder: Path) -> bool:
    """
    Whether `export_custom_generate` has written into a folder.

    Args:
        folder (`pathlib.Path`): the folder of a saved model.

    Returns:
        `bool`.
    """
    return (_Folder(folder).read(_GENERATE) or "").startswith(MARK)


def _choose_block_size(place: _Folder | _Repository, block_size: int | str | None) -> int | str | None:
    if block_size is not None:
        return check_block_size(block_size, "block_size", allows_auto=True)
    text = place.read("generation_config.json")
    try:
        saved = json.loads(text).get("jacobi_block_size") if text else None
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"`generation_config.json` of {place.name} must be an object of JSON, got: {error}. Save the model again."
        ) from error
    return None if saved is None else check_block_size(saved, allows_auto=True)


def _render_card(place: _Folder | _Repository, is_adapter: bool, is_lossless: bool) -> str:
    text = place.read(_CARD)
    if text is None:
        new = ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=[TAG])
        return f"---\n{new.to_yaml()}\n---\n\n{_card_text(place.title, is_adapter, is_lossless)}"
    try:
        card = ModelCard(text)
    except Exception as error:  # the parser of YAML has errors of its own
        raise ValueError(
            f"The metadata of {_CARD} of {place.name} must be valid YAML, got: {error}. Correct it and export again."
        ) from error
    data: Any = card.data
    tags = data.tags or []
    tags = [tags] if isinstance(tags, str) else list(tags)
    if TAG in tags:
        return text
    data.tags = [*tags, TAG]
    return str(card)


def usage_code(name: str, is_adapter: bool) -> str:
    """
    Code that decodes with an exported model, for people who have not installed this package.

    Args:
        name (`str`): folder or Hub id of the model or adapter.
        is_adapter (`bool`): whether it is an adapter, which transformers loads without its `custom_generate`.

    Returns:
        `str`: Python code.
    """
    load = "model = AutoModelForCausalLM.from_pretrained(name{trust})".format(
        trust="" if is_adapter else ", trust_remote_code=True"
    )
    call = ", custom_generate=name, trust_remote_code=True" if is_adapter else ""
    return f"""from transformers import AutoModelForCausalLM, AutoTokenizer

name = {quoted(name)}  # or the path of this folder
tokenizer = AutoTokenizer.from_pretrained(name)
{load}
inputs = tokenizer("Once upon a time", return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=64, return_dict_in_generate=True{call})
print(tokenizer.decode(output.sequences[0]))
print(output.jacobi_stats.tokens_per_forward)"""


_WHAT = """This {kind} comes with Jacobi decoding: it writes several tokens per forward pass, and
exactly the text of decoding one at a time."""
_WHAT_LOSSLESS = """This lossless adapter comes with its decoding: the adapter drafts, and the base model verifies, in
the same forward pass. The text is exactly that of the base model, several tokens a forward pass."""
_DECODING = """- `decoding`: `"jacobi"` by default; `"autoregressive"` is the decoding of transformers.
- `jacobi_block_size`: tokens checked in a forward pass, or `"auto"`."""
_DECODING_LOSSLESS = """- `decoding`: `"lossless"` by default; `"autoregressive"` is the base model and the decoding of
  transformers.
- `lossless_adapter`: folder or Hub id of this adapter, whose drafter is loaded from there; by default what
  `custom_generate` names.
- `jacobi_block_size`: tokens checked in a forward pass, or `"auto"`.
- `jacobi_drafts`: after how many places of a draft a forward pass drafts on."""


def _card_text(title: str, is_adapter: bool, is_lossless: bool) -> str:
    kind = "adapter" if is_adapter else "model"
    return f"""# {plain(title)}

{_WHAT_LOSSLESS if is_lossless else _WHAT.format(kind=kind)}

```python
{usage_code(title, is_adapter)}
```

## Compatibility

Text generation with the models of transformers. What is not supported is refused, with a message that names the way
out.

## Additional arguments

{_DECODING_LOSSLESS if is_lossless else _DECODING}
- `jacobi_candidates`: further guesses from the text itself, verified in the same forward pass.
- `jacobi_seed`: of sampling, with `do_sample=True`.
- `jacobi_compile`: whether to run compiled iterations of fixed shape.

## Output changes

With `return_dict_in_generate=True` the output has `jacobi_stats`: forward passes, and the tokens that each brought.
"""
