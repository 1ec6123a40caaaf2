"""Where prompts come from: a file with a prompt a line, or a dataset of the Hub or of this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..names import Name
from ..reading import is_deep
from .prompt_files import is_prompt, is_response, read_prompts_and_responses
from .prompts import check_prompt


PLACE = "{prompt}"
_COLUMNS = ("prompt", "question")
_FORMATS = {
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
}
Prompts = tuple[list[Any], list[Any] | None]


def read_source(
    file: str | None = None,
    dataset: str | None = None,
    config: str | None = None,
    split: str = "train",
    prompt_column: str | None = None,
    response_column: str | None = None,
    limit: int | None = None,
    template: str = PLACE,
) -> Prompts:
    """
    Read prompts, and responses to them if there are some.

    Args:
        file (`str`, *optional*): name of a file with prompts; see `read_prompts_and_responses`.
        dataset (`str`, *optional*): Hub id, folder or file of a dataset, if there is no file of prompts.
        config (`str`, *optional*): configuration of the dataset.
        split (`str`): split of the dataset.
        prompt_column (`str`, *optional*): column or JSON field of the prompts, by default `prompt` or `question`.
        response_column (`str`, *optional*): column or JSON field of the responses, by default none, but `response` for
            JSON lines that have it.
        limit (`int`, *optional*): read only so many.
        template (`str`): text around a prompt, which stands where `{prompt}` is; chat messages and tokens take none.

    Returns:
        `tuple[list[str | list[dict] | list[int]], list[str | list[int]] | None]`: the prompts, and a response to each
        or `None`.

    Raises:
        OSError: if the file or dataset cannot be read.
        ValueError: if there are no prompts, a value is no prompt or response, a chat is answered already or has
            messages of another form, a column is missing, or chat messages or token ids meet a template.
    """
    if file is not None:
        prompts, responses = read_prompts_and_responses(Path(file), limit, prompt_column, response_column)
    else:
        prompts, responses = _from_dataset(str(dataset), config, split, prompt_column, response_column, limit)
    return [apply_template(template, prompt) for prompt in prompts], responses


def apply_template(template: str, prompt: Any) -> Any:
    """
    Put the text of a template around a prompt.

    Args:
        template (`str`): has `{prompt}` where the prompt goes; other braces mean themselves, and a backslash before an
            n is a new line, which a command line cannot hold otherwise.
        prompt (`str`, `list[dict]` or `list[int]`): text, chat messages or token ids.

    Returns:
        `str`, or the messages or tokens as they are.

    Raises:
        ValueError: for messages or tokens and a template with further text.
    """
    if isinstance(prompt, str):
        return template.replace("\\n", "\n").replace(PLACE, prompt)
    if template != PLACE:
        raise ValueError(
            f"Only prompts that are text take a template, got `prompt_template` {template!r} for chat messages or "
            "token ids. Drop it, or pass text."
        )
    return prompt


def _from_dataset(
    name: str,
    config: str | None,
    split: str,
    prompt_column: str | None,
    response_column: str | None,
    limit: int | None,
) -> Prompts:
    dataset = _load(name, config, split)
    if limit is not None:
        dataset = dataset.select(range(min(limit, len(dataset))))
    if not len(dataset):
        raise ValueError(f"`dataset_name` must hold at least one prompt, got none in the split {split!r} of {name!r}.")
    columns = dataset.column_names
    if prompt_column is None:
        prompt_column = next((column for column in _COLUMNS if column in columns), None)
    missing = [column for column in (prompt_column, response_column) if column is not None and column not in columns]
    if prompt_column is None or missing:
        got = f"`{missing[0]}`" if missing else "neither `prompt` nor `question`"
        raise ValueError(
            f"The dataset {name!r} has the columns {', '.join(columns)}, got {got}. Pass one of those as "
            f"`{'response_column' if missing and missing[0] == response_column else 'prompt_column'}`."
        )
    prompts = list(dataset[prompt_column])
    _check_values(name, prompt_column, [is_prompt(prompt) for prompt in prompts], prompts)
    for row, prompt in enumerate(prompts):
        check_prompt(prompt, f"prompt {row}")
    if response_column is None:
        return prompts, None
    responses = list(dataset[response_column])
    _check_values(name, response_column, [is_response(response) for response in responses], responses)
    return prompts, responses


def _check_values(name: str, column: str, fits: list[bool], values: list[Any]) -> None:
    if not all(fits):
        row = fits.index(False)
        raise ValueError(
            f"The column `{column}` of {name!r} must hold text or token ids, got {str(values[row])[:60]!r} in row "
            f"{row}. Choose another column, or drop that row."
        )


def _load(name: str, config: str | None, split: str) -> Any:
    from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
    from datasets.exceptions import DatasetsError

    path = Path(name).expanduser()
    Name.find(path if name.startswith("~") else name).check("dataset_name", "dataset", takes_files=True)
    suffix = path.suffix.lower()
    if path.is_file() and suffix not in _FORMATS:
        raise ValueError(
            f"`dataset_name` must be a file of one of the kinds {', '.join(_FORMATS)}, got {name!r}. Convert it, or "
            "pass the folder it is in."
        )
    if path.is_file() and not path.stat().st_size:
        raise ValueError(f"`dataset_name` must hold at least one prompt, got the empty file {name!r}.")
    if path.is_file() and _FORMATS[suffix] == "json" and is_deep(path):
        raise ValueError(f"The dataset {name!r} could not be loaded (it is nested too deeply to be read).")
    loaded: Any
    try:
        if path.is_file():
            options = {"delimiter": "\t"} if suffix == ".tsv" else {}
            loaded = load_dataset(_FORMATS[suffix], config, data_files=str(path), split=split, **options)
        elif any((path / file).exists() for file in ("state.json", "dataset_dict.json")):
            loaded = load_from_disk(str(path))
        else:
            loaded = load_dataset(str(path) if path.is_dir() else name, config, split=split)
    except (OSError, EOFError, ValueError, RecursionError, DatasetsError) as error:
        known = error.__cause__ or error  # `datasets` says of most files only that something went wrong
        reason = (str(known).strip() or type(known).__name__).splitlines()[0]
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"The dataset {name!r} could not be loaded ({reason}).") from error
    if isinstance(loaded, DatasetDict):
        if split not in loaded:
            raise ValueError(f"`dataset_split` must be one of {', '.join(loaded)}, got {split!r}.")
        loaded = loaded[split]
    assert isinstance(loaded, Dataset)
    return loaded
