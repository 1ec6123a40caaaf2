"""How commands read their options: what numbers argparse takes, and options of dataclasses, also from a YAML file."""

from __future__ import annotations

import argparse
import dataclasses
import os
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml  # type: ignore[import-untyped]
from huggingface_hub.dataclasses import type_validator
from transformers import HfArgumentParser

from .options import JacobiOptions


def positive(text: str) -> int:
    """Read an integer of at least 1, as a `type` of argparse."""
    return _at_least(1, text)


def natural(text: str) -> int:
    """Read an integer of at least 0, as a `type` of argparse."""
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"must be an integer of at least {least}, got {text!r}")
    return int(text)


def port(text: str) -> int:
    """Read the number of a port, as a `type` of argparse."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"must be a port from 0 to 65535, got {text!r}")
    return int(text)


def block_size(text: str) -> int | str:
    """Read a block size, an integer of at least 1 or "auto", as a `type` of argparse."""
    return text if text == "auto" else positive(text)


def num_candidates(text: str) -> int:
    """Read what `generate` takes as `jacobi_candidates`, as a `type` of argparse."""
    value: Any = int(text) if text.removeprefix("-").isdecimal() else text
    try:
        return JacobiOptions(candidates=value).candidates
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, where there is one to show: not `None`, nor that a flag is off."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_default = action.default is not None and action.default is not False and action.default != []
        return super()._get_help_string(action) if has_default else action.help


class OptionParser(HfArgumentParser):
    """
    Reads options from the command line and a YAML file, which have to be right in both.

    The file has what it has for TRL's parser, `env` for environment variables too.

    Args:
        kinds (`Iterable[type]`): dataclasses whose fields are the options.
        command (`str`): what the user types, such as `"cllm collect"`.
        description (`str`): what it does, for `--help`.
        usage (`str`, *optional*): how it is called, where a list of all options is too long.
        other_names (`Mapping[str, str]`, *optional*): further names of options, to the name that each has as a field.
        convert (`Mapping[str, Callable[[Any], Any]]`, *optional*): makes of a value of the file, by the name of its
            option, what the option takes.
        adapt (`Callable[[argparse.Namespace, argparse.ArgumentParser], None]`, *optional*): completes what was read in
            place, before the dataclasses are made of it.
    """

    def __init__(
        self,
        kinds: Iterable[Any],
        command: str,
        description: str,
        usage: str | None = None,
        other_names: Mapping[str, str] | None = None,
        convert: Mapping[str, Callable[[Any], Any]] | None = None,
        adapt: Callable[[argparse.Namespace, argparse.ArgumentParser], None] | None = None,
    ):
        kinds = list(kinds)
        super().__init__(
            kinds,
            prog=command,
            usage=usage,
            description=description,
            allow_abbrev=False,
            formatter_class=HelpFormatter,
        )
        for action in self._actions:
            if action.nargs == 0 and action.const is False:  # that HfArgumentParser adds where the default is true
                action.help = f"switch --{action.dest} off"
        self._kinds = kinds
        self._other_names = dict(other_names or {})
        self._convert = dict(convert or {})
        self._adapt = adapt
        self.add_argument(
            "--config", metavar="FILE", help="YAML file with options by name; options of the command line win over it"
        )
        for other, name in self._other_names.items():
            self.add_argument(f"--{other}", dest=name, default=argparse.SUPPRESS, help=f"the same as --{name}")

    def read(self, arguments: Sequence[str]) -> tuple[Any, ...]:
        """
        Read the options, and make an object of each of the dataclasses.

        Args:
            arguments (`Sequence[str]`): what stands after the command. Options win over the file of `--config`.

        Raises:
            OSError: if the YAML file cannot be read.
            ValueError: for unknown options, values that a dataclass refuses, or a file that is not YAML.
            SystemExit: after `--help`, and with status 2 for missing options and values that cannot be read.
        """
        finder = argparse.ArgumentParser(prog=self.prog, usage=self.usage, add_help=False, allow_abbrev=False)
        finder.add_argument("--config", action="append")
        files = finder.parse_known_args(arguments)[0].config or []
        if len(files) > 1:
            self.error("argument --config: expected one file")
        unknown = self.take(_read_file(files[0])) if files else []
        *parsed, _, others = self.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
        unknown += others
        if unknown:
            raise ValueError(
                f"`{self.prog}` has no such options, got {' '.join(unknown)}. `{self.prog} --help` lists them; in a "
                "YAML file their names have underscores."
            )
        return tuple(parsed)

    def take(self, values: dict[str, Any]) -> list[str]:
        """
        Take values of a file by name as defaults, and return unknown ones as they would be typed.

        Raises:
            ValueError: for a value that is not of the type of its option, or an option under two names.
        """
        for other, name in self._other_names.items():
            if other in values:
                if name in values:
                    raise ValueError(f"`{other}` and `{name}` are the same, got both. Drop one of them.")
                values[name] = values.pop(other)
        for name in values.keys() & self._convert.keys():
            values[name] = self._convert[name](values[name])
        for kind in self._kinds:
            hints = get_type_hints(kind)
            for field in dataclasses.fields(kind):
                if field.name in values:
                    values[field.name] = _check_value(field, values[field.name], hints[field.name])
        for action in self._actions:
            if action.dest in values:
                action.default, action.required = values[action.dest], False
        known = {action.dest for action in self._actions}
        return [part for name, value in values.items() if name not in known for part in (f"--{name}", str(value))]

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """As argparse does; the parser calls this before it makes the dataclasses."""
        namespace, unknown = super().parse_known_args(args, namespace)
        if self._adapt is not None:
            self._adapt(namespace, self)
        return namespace, unknown


def _read_file(name: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(Path(name).read_text(encoding="utf-8"))
    except OSError as error:
        raise OSError(
            f"`--config` must be a file that can be read, got {name!r} ({error.strerror}). Check its name."
        ) from error
    except (yaml.YAMLError, RecursionError, UnicodeDecodeError) as error:
        values, reason = None, " ".join(str(error).split())
    else:
        reason = "it has none"
    if not isinstance(values, dict) or not all(isinstance(option, str) for option in values):
        raise ValueError(f"The file of `--config` must be YAML with options by name, got {name!r} ({reason}).")
    variables = values.pop("env", {})
    if not isinstance(variables, dict):
        raise ValueError(f"`env` of the file of `--config` must have variables by name, got {variables!r}.")
    os.environ.update({str(variable): str(value) for variable, value in variables.items()})
    return values


def _check_value(field: dataclasses.Field[Any], value: Any, hint: Any) -> Any:
    """A value of a file, as the option takes it: YAML has types of its own, which the parser does not look at."""
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    choices = _choices_of(field, kinds)
    if value is False and "no" in choices:  # what YAML makes of `save_strategy: no`
        return "no"
    if value is True and field.metadata.get("const") is True:  # a text by its type, as `fsdp`, but set by its name
        return value
    # Texts are read like those of the command line, which checks them.
    fits = not choices or value in choices if isinstance(value, str) else _is_of(value, hint)
    if not fits:
        if choices:
            expected = " or ".join(map(repr, choices))
        else:
            names = [getattr(kind, "__name__", str(kind)) for kind in kinds if kind is not type(None)]
            expected = "of type " + " or ".join(names)
        raise ValueError(f"`{field.name}` must be {expected}, got {value!r}.")
    return value


def _choices_of(field: dataclasses.Field[Any], kinds: tuple[Any, ...]) -> list[Any]:
    """All texts that an option takes; none if it takes any."""
    choices = list(field.metadata.get("choices", ()))
    for kind in kinds:
        if get_origin(kind) is Literal and str not in kinds:
            choices += get_args(kind)
        elif isinstance(kind, type) and issubclass(kind, Enum):
            choices += [member.value for member in kind]
    return choices


def _is_of(value: Any, hint: Any) -> bool:
    for one in (value, _with_floats(value)):
        try:
            type_validator("value", one, hint)
        except TypeError:
            continue
        return True
    return False


def _with_floats(value: Any) -> Any:
    """The same with its integers as the floats that they are as well."""
    if isinstance(value, list):
        return [_with_floats(item) for item in value]
    return float(value) if type(value) is int else value
