"""
Where prompts come from, and responses to them: a dataset, or a file with one a line, as text or as JSON, or with the
records of a JSON array.
"""

from __future__ import annotations

import re
import reprlib
from pathlib import Path
from typing import Any

from ..files import check_unicode, decode_text, is_deep, parse_json
from ..names import Name
from .prompts import check_prompt, is_chat


PLACE = "{prompt}"
Prompts = tuple[list[Any], list[Any] | None]
_NAMES = ("prompt", "question")
_RESPONSE = "response"
_FORMATS = {
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
}
# Tables that `datasets` reads, and no text with a prompt a line.
_TABLES = (".csv", ".tsv", ".parquet", ".arrow")
_JSON_LINES = (".jsonl", ".ndjson")


def read_source(
    file: str | None = None,
    dataset: str | None = None,
    config: str | None = None,
    split: str = "train",
    prompt_column: str | None = None,
    response_column: str | None = None,
    limit: int | None = None,
    template: str = PLACE,
    is_chat: bool = False,
) -> Prompts:
    """
    Read the prompts of a file or a dataset (texts, chat messages or token ids), and a response to each or `None`.

    By default prompts are in the column or JSON field `prompt` or `question`, and only JSON has responses, if it has
    the field `response`. The text of the template stands around prompts that are text; in a chat they are messages.
    """
    if file is not None:
        prompts, responses = read_prompts_and_responses(Path(file), limit, prompt_column, response_column)
    else:
        prompts, responses = _from_dataset(str(dataset), config, split, prompt_column, response_column, limit)
    prompts = [apply_template(template, prompt) for prompt in prompts]
    return [as_chat(prompt) for prompt in prompts] if is_chat else prompts, responses


def apply_template(template: str, prompt: Any) -> Any:
    """
    Put the text of a template around a prompt; other prompts than text stay as they are.

    Braces but those of `{prompt}` mean themselves, and a backslash before an n is a new line, which a command line
    cannot hold otherwise.
    """
    if isinstance(prompt, str):
        return template.replace("\\n", "\n").replace(PLACE, prompt)
    if template != PLACE:
        raise ValueError(
            f"Only prompts that are text take a template, got `prompt_template` {template!r} for chat messages or "
            "token ids. Drop it, or pass text."
        )
    return prompt


def as_chat(prompt: Any) -> Any:
    """A prompt as the message of a user; chat messages stay as they are."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    if not is_chat(prompt):
        raise ValueError(f"`chat` takes prompts that are text, got token ids, {reprlib.repr(prompt)}. Drop it.")
    return prompt


# Files


def read_prompts(path: Path, limit: int | None = None) -> list[Any]:
    """Read the prompts of a file, of any kind; empty lines are left out."""
    return _take(path, *_read(path, limit), _NAMES, None)[0]


def read_prompts_and_answers(path: Path, limit: int | None = None) -> tuple[list[Any], list[str] | None]:
    """As `read_prompts`, with the right answer to each where the file has the field `answer`, or else `response`."""
    entries, is_json = _read(path, limit)
    for field in ("answer", _RESPONSE):
        prompts, answers = _take(path, entries, is_json, _NAMES, field, only_texts=True)
        if answers is not None:
            break
    return prompts, answers


def read_prompts_and_responses(
    path: Path, limit: int | None = None, prompt_field: str | None = None, response_field: str | None = None
) -> Prompts:
    """Read prompts of any kind, and responses to them where the file has some; a field that is named must be there."""
    entries, is_json = _read(path, limit)
    if not is_json and (prompt_field or response_field):
        raise ValueError(
            f"Only JSON lines have fields, got the field {prompt_field or response_field!r} for {str(path)!r}, "
            "which is plain text. Name no fields, or write a JSON object a line."
        )
    names = _NAMES if prompt_field is None else (prompt_field,)
    return _take(path, entries, is_json, names, response_field or _RESPONSE, must_respond=response_field is not None)


def _take(
    path: Path,
    entries: list[tuple[str, Any]],
    is_json: bool,
    names: tuple[str, ...],
    response_field: str | None,
    only_texts: bool = False,
    must_respond: bool = False,
) -> Prompts:
    """
    The prompts of what `_read` gave, and the responses, if all have one; some alone are an error. With `only_texts`
    others than texts and numbers, which become texts, are none.
    """
    if not is_json:
        return [line for _, line in entries], None
    prompts, responses = [], []
    for index, (place, record) in enumerate(entries):
        where = f"prompt {index} ({place.lower()} of {str(path)!r})"
        fields = record if isinstance(record, dict) else {}
        prompt = next((fields[name] for name in names if name in fields), None)
        if not (prompt.strip() if isinstance(prompt, str) else _is_prompt(prompt)):
            raise ValueError(
                f"{place} of {str(path)!r} must be a JSON object with text in a field "
                f"{' or '.join(f'`{name}`' for name in names)}, got {reprlib.repr(record)}. Correct that "
                f"{place.split()[0].lower()}."
            )
        check_prompt(prompt, where)
        response = fields.get(response_field)
        if only_texts and isinstance(response, (int, float)) and not isinstance(response, bool):
            response = str(response)  # an answer that is a number
        if isinstance(response, str):
            check_unicode(response, f"the response to {where}")
        elif only_texts or not _is_response(response):
            response = None
        prompts.append(prompt)
        responses.append(response)
    without = [place for (place, _), response in zip(entries, responses) if response is None]
    if len(without) == len(entries) and not must_respond:
        return prompts, None
    if without:
        raise ValueError(
            f"{without[0]} of {str(path)!r} must have text in the field `{response_field}`, got none. Give every "
            "prompt one, or none."
        )
    return prompts, responses


def _is_prompt(value: Any) -> bool:
    return is_chat(value) or _is_response(value)


def _is_response(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list) and bool(value) and all(type(token) is int for token in value)
    )


def _read(path: Path, limit: int | None) -> tuple[list[tuple[str, Any]], bool]:
    """
    The first lines or records of a file, at least one, each with the name of its place; and whether they are JSON, as
    the end of the file's name or its beginning says.
    """
    text = _read_text(path)
    numbered = [(number, line.strip()) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not numbered:
        raise ValueError(f"`--prompts` must hold at least one prompt, got none in {str(path)!r}. Write one a line.")
    first = numbered[0][1]
    is_json = path.suffix.lower() in (".json", *_JSON_LINES) or first.startswith("{") or first == "["
    records = _read_whole(path, text, first, is_json)
    if records is not None:
        if not records:
            raise ValueError(f"`--prompts` must hold at least one prompt, got none in {str(path)!r}, an empty array.")
        return [(f"Record {number}", record) for number, record in enumerate(records[:limit], start=1)], True
    entries = [
        (f"Line {number}", _parse_line(line, number, path) if is_json else line) for number, line in numbered[:limit]
    ]
    if not entries:
        raise ValueError(f"`--prompts` must give at least one prompt, got a limit of {limit}. Raise it.")
    return entries, is_json


def _read_text(path: Path) -> str:
    hint = f"`cllm collect --dataset-name {path}`"
    if path.is_dir():
        raise OSError(
            f"`--prompts` must be a file that can be read, got the folder {str(path)!r}. Name a file in it, or read "
            f"it as a dataset by {hint}."
        )
    if path.is_file() and path.suffix.lower() in _TABLES:
        raise ValueError(
            f"`--prompts` must be a text file with a prompt a line, or JSON, got the table {str(path)!r}. Convert it "
            f"to JSON lines, or read it as a dataset by {hint}."
        )
    try:
        content = path.read_bytes()
    except OSError as error:
        raise OSError(
            f"`--prompts` must be a file that can be read, got {str(path)!r} ({error.strerror}). Check its name."
        ) from error
    try:
        return decode_text(content)
    except ValueError as error:
        raise ValueError(
            f"`--prompts` must be a text file in UTF-8, got {str(path)!r} ({error}). Convert it; tables are read as a "
            f"dataset by {hint}."
        ) from error


def _read_whole(path: Path, text: str, first: str, is_json: bool) -> list[Any] | None:
    """The records of a file that is one JSON array or object; `None` for text, and for an object a line."""
    begins_with_record = re.match(r'\s*\[\s*\{\s*"', text) is not None
    if not is_json and not begins_with_record:
        return None
    try:
        is_array = isinstance(parse_json(first), list)
        if not is_array or not (begins_with_record or path.suffix.lower() == ".json"):
            return None
    except ValueError:
        is_array = first.startswith("[")
    try:
        found = parse_json(text)
    except ValueError as error:
        if not is_array:
            return None  # a line that is wrong is named by its number
        raise ValueError(
            f"`--prompts` must be a JSON array where it begins like one, got {str(path)!r} ({error}). Correct it, or "
            "write a JSON object a line."
        ) from error
    return found if isinstance(found, list) else [found]


def _parse_line(line: str, number: int, path: Path) -> Any:
    try:
        return parse_json(line)
    except ValueError as error:
        reason = getattr(error, "msg", error)
        raise ValueError(
            f"Line {number} of {str(path)!r} must be JSON, got {line[:60]!r} ({reason}). Correct that line."
        ) from error


# Datasets


def _from_dataset(
    name: str,
    config: str | None,
    split: str,
    prompt_column: str | None,
    response_column: str | None,
    limit: int | None,
) -> Prompts:
    dataset = load_source(name, config, split)
    if limit is not None:
        dataset = dataset.select(range(min(limit, len(dataset))))
    if not len(dataset):
        raise ValueError(f"`dataset_name` must hold at least one prompt, got none in the split {split!r} of {name!r}.")
    columns = dataset.column_names
    if prompt_column is None:
        prompt_column = next((column for column in _NAMES if column in columns), None)
    missing = [column for column in (prompt_column, response_column) if column is not None and column not in columns]
    if prompt_column is None or missing:
        got = f"`{missing[0]}`" if missing else "neither `prompt` nor `question`"
        raise ValueError(
            f"The dataset {name!r} has the columns {', '.join(columns)}, got {got}. Pass one of those as "
            f"`{'response_column' if missing and missing[0] == response_column else 'prompt_column'}`."
        )
    prompts = list(dataset[prompt_column])
    _check_values(name, prompt_column, [_is_prompt(prompt) for prompt in prompts], prompts)
    for row, prompt in enumerate(prompts):
        check_prompt(prompt, f"prompt {row}")
    if response_column is None:
        return prompts, None
    responses = list(dataset[response_column])
    _check_values(name, response_column, [_is_response(response) for response in responses], responses)
    return prompts, responses


def _check_values(name: str, column: str, fits: list[bool], values: list[Any]) -> None:
    if not all(fits):
        row = fits.index(False)
        raise ValueError(
            f"The column `{column}` of {name!r} must hold text or token ids, got {str(values[row])[:60]!r} in row "
            f"{row}. Choose another column, or drop that row."
        )


def load_source(name: str, config: str | None, split: str, option: str = "dataset_name") -> Any:
    """Load a dataset from a file, a folder or the Hub, which `option` of a command names."""
    from datasets import DatasetDict, load_dataset, load_from_disk
    from datasets.exceptions import DatasetsError

    path = Path(name).expanduser()
    Name.find(path if name.startswith("~") else name).check(option, "dataset", takes_files=True)
    suffix = path.suffix.lower()
    if path.is_file() and suffix not in _FORMATS:
        raise ValueError(
            f"`{option}` must be a file of one of the kinds {', '.join(_FORMATS)}, got {name!r}. Convert it, or "
            "pass the folder it is in."
        )
    if path.is_file() and not path.stat().st_size:
        raise ValueError(f"`{option}` must hold at least one prompt, got the empty file {name!r}.")
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
    return loaded
