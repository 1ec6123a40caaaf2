"""Sections of a config: options by name, checked against the dataclass that they are options of."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection, Mapping, Sequence
from enum import Enum
from typing import Any, NoReturn, TypeVar

import yaml  # type: ignore[import-untyped]

from cllm_hf.parsing import OptionParser


_Kind = TypeVar("_Kind")


class _SectionParser(OptionParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message[0].upper()}{message[1:]}.")


def read_section(kind: type[_Kind], values: Any, section: str) -> _Kind:
    """
    Make a dataclass of the values of a section.

    Args:
        kind (`type`): the dataclass, such as `trl.SFTConfig`.
        values (`Mapping[str, Any]`): from YAML, which may hold numbers as texts (`1e-3` is one there).
        section (`str`): its name, for errors.

    Returns:
        The dataclass.

    Raises:
        ValueError: for an unknown option, a value of another type, or one that the dataclass refuses.
    """
    check_names(values, {field.name for field in dataclasses.fields(kind) if field.init}, section)  # type: ignore[arg-type]
    try:
        parser = _SectionParser([kind], command=section, description="")
        parser.take(dict(values))
        return parser.parse_args_into_dataclasses(args=[])[0]
    except ValueError as error:
        raise ValueError(f"Section `{section}`: {error}") from error


def check_names(values: Any, known: Collection[str], section: str) -> None:
    """
    Check that a section has no options but known ones.

    Args:
        values (`Any`): what stands in the section.
        known (`Collection[str]`): names of options.
        section (`str`): its name.

    Raises:
        ValueError: if it is no mapping, or for the first name that is not known; names the closest one.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"Section `{section}` must hold options by name, got {values!r}.")
    for name in values:
        if name not in known:
            raise ValueError(f"There is no option `{section}.{name}`.{closest(str(name), known, section)}")


def closest(name: str, known: Collection[str], section: str = "") -> str:
    """
    Say which name may be meant.

    Args:
        name (`str`): what was written.
        known (`Collection[str]`): what there is.
        section (`str`): where, if in a section.

    Returns:
        `str`: a sentence after a space.
    """
    found = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    prefix = f"{section}." if section else ""
    if found:
        return f" Did you mean `{prefix}{found[0]}`?"
    if len(known) <= 20:
        return f" There are {', '.join(f'`{prefix}{one}`' for one in sorted(known))}."
    return " The documentation of its class lists all."


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> None:
    """
    Change values of a config in place.

    Args:
        values (`dict[str, Any]`): sections by name.
        overrides (`Sequence[str]`): such as `"train.max_steps=10"`; the value is read as YAML.

    Raises:
        ValueError: for one that is not written so, or lies in something that is no section.
    """
    for override in overrides:
        path, sign, text = override.partition("=")
        names = path.strip().split(".")
        if not sign or not all(names):
            raise ValueError(f"`--set` takes SECTION.OPTION=VALUE, got {override!r}.")
        try:
            value = yaml.safe_load(text)
        except (yaml.YAMLError, RecursionError) as error:
            raise ValueError(f"`--set` takes values as in YAML, got {override!r}.") from error
        place = values
        for name in names[:-1]:
            if place.get(name) is None:
                place[name] = {}
            place = place[name]
            if not isinstance(place, dict):
                raise ValueError(
                    f"`--set` takes SECTION.OPTION=VALUE, got {override!r}, where `{name}` is no section."
                )
        place[names[-1]] = value


def changed_values(made: Any, given: Mapping[str, Any], incidental: Collection[str] = ()) -> dict[str, Any]:
    """
    Options that are not the defaults of their dataclass, ready for JSON.

    Args:
        made (`Any`): the dataclass.
        given (`Mapping[str, Any]`): what was given for it.
        incidental (`Collection[str]`): names that are left out.

    Returns:
        `dict[str, Any]`: values by name, sorted.
    """
    fields = {field.name: field for field in dataclasses.fields(made)}
    changed = {}
    for name in sorted(set(given) - set(incidental)):
        value = getattr(made, name)
        value = value.value if isinstance(value, Enum) else value
        if not isinstance(value, (str, int, float, bool, list, dict, type(None))):
            value = given[name]
        if value != fields[name].default:
            changed[name] = value
    return changed
