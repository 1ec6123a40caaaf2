"""The options of `generate` that belong to Jacobi decoding, and their validation."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any


# Values of `decoding` that are built in.
JACOBI, LOSSLESS, AUTOREGRESSIVE = "jacobi", "lossless", "autoregressive"
DEFAULT_BLOCK_SIZE = 16
AUTO = "auto"


@dataclass(frozen=True)
class JacobiOptions:
    """
    Options of one call of `generate(decoding="jacobi")`.

    Attributes:
        block_size (`int` or `"auto"`): positions checked in a forward pass; `"auto"` measures what pays.
        candidates (`int`): further guesses from a pool of n-grams, verified in the same forward pass.
        seed (`int`, *optional*): of the noise of sampling; by default drawn from torch's own generator.
        compile (`bool`, *optional*): whether iterations run as one compiled graph of fixed shape, on a static cache;
            by default on a GPU, where the model allows it.
        drafts (`int`, *optional*): with `decoding="lossless"`, after how many places of a draft a forward pass drafts
            on; by default as many as the device runs at hardly any cost.

    Raises:
        ValueError: for a value of the wrong kind or out of range.
    """

    block_size: int | str = AUTO
    candidates: int = 0
    seed: int | None = None
    compile: bool | None = None
    drafts: int | None = None

    def __post_init__(self) -> None:
        values: dict[str, Any] = {
            "block_size": check_block_size(self.block_size, allows_auto=True),
            "candidates": _check_integer(self.candidates, "jacobi_candidates", 0, "Typical values are 1 to 4."),
        }
        if self.drafts is not None:
            values["drafts"] = _check_integer(self.drafts, "jacobi_drafts", 1, "Typical values are 2 to 8.")
        if self.seed is not None:
            values["seed"] = _check_integer(self.seed, "jacobi_seed", 0, "Pass a number such as 0.")
            if values["seed"] >= 2**63:
                raise ValueError(
                    f"`jacobi_seed` must be an integer below 2**63, got {self.seed!r}. Pass a smaller one."
                )
        for name, value in values.items():
            object.__setattr__(self, name, value)  # as Python's own, whatever kind of integer was passed
        if self.compile is not None and not isinstance(self.compile, bool):
            raise ValueError(f"`jacobi_compile` must be `True` or `False`, got {self.compile!r}.")
        if self.compile and self.candidates:
            raise ValueError(
                f"A compiled forward pass has one shape, got `jacobi_candidates={self.candidates}` with "
                '`jacobi_compile=True` or `cache_implementation="static"`. Drop one of the two.'
            )


# Arguments of `generate` and entries of a generation config.
OPTION_NAMES = tuple(f"jacobi_{field.name}" for field in fields(JacobiOptions))


def check_block_size(value: object, name: str = "jacobi_block_size", allows_auto: bool = False) -> Any:
    """A block size as an integer of Python, or `"auto"` where that is allowed; an error for anything else."""
    if allows_auto and isinstance(value, str) and value == AUTO:
        return value
    return _check_integer(value, name, 1, "Typical values are 8 to 64.", ' or "auto"' if allows_auto else "")


def _check_integer(value: Any, name: str, least: int, hint: str, others: str = "") -> int:
    number = as_integer(value)
    if number is None or number < least:
        raise ValueError(f"`{name}` must be an integer of at least {least}{others}, got {value!r}. {hint}")
    return number


def as_integer(value: Any) -> int | None:
    """An integer of any kind, such as numpy's; `None` for anything else, truth values among them."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def option_of(call: dict[str, Any], configs: Sequence[Any], name: str) -> Any:
    """An option of `generate`: of the call, or else of the first generation config that has it."""
    return call[name] if call.get(name) is not None else first_set(configs, name)


def first_set(configs: Sequence[Any], name: str) -> Any:
    """The value of the first generation config that has one."""
    values = (getattr(config, name, None) for config in configs)
    return next((value for value in values if value is not None), None)
