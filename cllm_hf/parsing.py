"""TRL's parser, as commands use it: options of dataclasses from the command line and a YAML file."""

from __future__ import annotations

import argparse
import dataclasses
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml  # type: ignore[import-untyped]
from trl import TrlParser


class OptionParser(TrlParser):
    """
    Reads options from the command line and a YAML file, which have to be right in both.

    TRL's parser takes `--config` itself, but neither lists it nor knows its other spelling, and does not look at the
    values of the file, which have types of their own.

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
        super().__init__(kinds, prog=command, usage=usage, description=description, allow_abbrev=False)
        self._kinds = kinds
        self._other_names = dict(other_names or {})
        self._convert = dict(convert or {})
        self._adapt = adapt
        self._has_read_file = False
        self.add_argument("--config", metavar="FILE", help="YAML file with options by name; those given here win")
        for other, name in self._other_names.items():
            self.add_argument(f"--{other}", dest=name, default=argparse.SUPPRESS, help=f"the same as --{name}")

    def read(self, arguments: Sequence[str]) -> tuple[Any, ...]:
        """
        Read the options.

        Args:
            arguments (`Sequence[str]`): what stands after the command. Options win over the file of `--config`.

        Returns:
            `tuple`: an object of each of the dataclasses.

        Raises:
            OSError: if the YAML file cannot be read.
            ValueError: for unknown options, values that a dataclass refuses, or a file that is not YAML.
            SystemExit: after `--help`, and with status 2 for missing options and values that cannot be read.
        """
        arguments = [part for argument in arguments for part in _split_config(argument)]
        if arguments[-1:] == ["--config"] or arguments.count("--config") > 1:
            self.error("argument --config: expected one file")
        file = _file_of(arguments)
        try:
            *parsed, _, unknown = self.parse_args_and_config(arguments, return_remaining_strings=True)
        except (yaml.YAMLError, TypeError, RecursionError) as error:
            if isinstance(error, TypeError) and (file is None or self._has_read_file):  # not of names that are no text
                raise
            reason = " ".join(str(error).split())
            raise ValueError(
                f"The file of `--config` must be YAML with options by name, got {file!r} ({reason})."
            ) from error
        except OSError as error:
            if file is None or error.filename != file:
                raise
            raise OSError(
                f"`--config` must be a file that can be read, got {file!r} ({error.strerror}). Check its name."
            ) from error
        if unknown:
            raise ValueError(
                f"`{self.prog}` has no such options, got {' '.join(unknown)}. `{self.prog} --help` lists them; in a "
                "YAML file their names have underscores."
            )
        return tuple(parsed)

    def set_defaults_with_config(self, **values: Any) -> list[str]:
        """
        Take the values of the file as defaults. The parser calls this with what it has read.

        Args:
            values: options by name.

        Returns:
            `list[str]`: unknown options.

        Raises:
            ValueError: for a value that is not of the type of its option, or an option under two names.
        """
        self._has_read_file = True
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
        return super().set_defaults_with_config(**values)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """As argparse does; the parser calls this before it makes the dataclasses."""
        namespace, unknown = super().parse_known_args(args, namespace)
        if self._adapt is not None:
            self._adapt(namespace, self)
        return namespace, unknown


def _split_config(argument: str) -> list[str]:
    return argument.split("=", 1) if argument.startswith("--config=") else [argument]


def _file_of(arguments: list[str]) -> str | None:
    return arguments[arguments.index("--config") + 1] if "--config" in arguments else None


def _check_value(field: dataclasses.Field[Any], value: Any, hint: Any) -> Any:
    """A value of a file, as the option takes it: YAML has types of its own, which the parser does not look at."""
    choices = _choices_of(field, hint)
    if value is False and "no" in choices:  # what YAML makes of `save_strategy: no`
        return "no"
    if value is True and field.metadata.get("const") is True:  # a text by its type, as `fsdp`, but set by its name
        return value
    if not _fits(value, hint) or (isinstance(value, str) and choices and value not in choices):
        if choices:
            expected = " or ".join(map(repr, choices))
        else:
            kinds = [kind for kind in _kinds_of(hint) if kind is not type(None)]
            expected = "of type " + " or ".join(getattr(kind, "__name__", str(kind)) for kind in kinds)
        raise ValueError(f"`{field.name}` must be {expected}, got {value!r}.")
    return value


def _choices_of(field: dataclasses.Field[Any], hint: Any) -> list[Any]:
    """All texts that an option takes; none if it takes any."""
    choices = list(field.metadata.get("choices", ()))
    for kind in _kinds_of(hint):
        if get_origin(kind) is Literal and str not in _kinds_of(hint):
            choices += get_args(kind)
        elif isinstance(kind, type) and issubclass(kind, Enum):
            choices += [member.value for member in kind]
    return choices


def _kinds_of(hint: Any) -> tuple[Any, ...]:
    """The types of a union, or the one type."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of a file is of a type. Texts are read like those of the command line, which checks them."""
    return isinstance(value, str) or any(_is_of(value, kind) for kind in _kinds_of(hint))


def _is_of(value: Any, kind: Any) -> bool:
    origin = get_origin(kind)
    if origin is Literal:
        return value in get_args(kind)
    if kind is Any:
        return True
    if origin is list:
        return isinstance(value, list) and all(_fits(item, get_args(kind)[0]) for item in value)
    if kind is float:
        return type(value) in (int, float)
    if kind in (bool, int, type(None)):
        return type(value) is (type(None) if kind is type(None) else kind)
    if kind is str or isinstance(kind, type) and issubclass(kind, Enum):
        return False  # texts were taken before
    return isinstance(value, origin or (kind if isinstance(kind, type) else object))
