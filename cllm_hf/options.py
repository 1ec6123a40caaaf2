"""The options of `generate` that belong to Jacobi decoding, and their validation."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


# Values of `decoding` that are built in.
JACOBI, LOSSLESS, AUTOREGRESSIVE = "jacobi", "lossless", "autoregressive"
DEFAULT_BLOCK_SIZE = 16
AUTO = "auto"
# Arguments of `generate` and entries of a generation config; without the prefix, the fields of `JacobiOptions`.
OPTION_NAMES = ("jacobi_block_size", "jacobi_candidates", "jacobi_seed", "jacobi_compile", "jacobi_drafts")


@dataclass(frozen=True)
class JacobiOptions:
    """
    Options of one call of `generate(decoding="jacobi")`.

    Attributes:
        block_size (`int` or `"auto"`): positions checked in a forward pass; `"auto"` measures what pays.
        candidates (`int`): further guesses from a pool of n-grams, verified in the same forward pass.
        seed (`int`, *optional*): of the noise of sampling; by default drawn from torch's own generator.
        compile (`bool`): whether iterations run as one compiled graph of fixed shape, on a static cache.
        drafts (`int`, *optional*): with `decoding="lossless"`, after how many places of a draft a forward pass drafts
            on; by default as many as the device runs at hardly any cost.

    Raises:
        ValueError: for a value of the wrong kind or out of range.
    """

    block_size: int | str = AUTO
    candidates: int = 0
    seed: int | None = None
    compile: bool = False
    drafts: int | None = None

    def __post_init__(self) -> None:
        block_size = check_block_size(self.block_size, allows_auto=True)
        seed, candidates = as_integer(self.seed), as_integer(self.candidates)
        drafts = as_integer(self.drafts)
        if self.drafts is not None and (drafts is None or drafts < 1):
            raise ValueError(
                f"`jacobi_drafts` must be an integer of at least 1, got {self.drafts!r}. Typical values are 2 to 8."
            )
        if self.seed is not None and (seed is None or not 0 <= seed < 2**63):
            raise ValueError(f"`jacobi_seed` must be an integer of at least 0 and below 2**63, got {self.seed!r}.")
        if not isinstance(self.compile, bool):
            raise ValueError(f"`jacobi_compile` must be `True` or `False`, got {self.compile!r}.")
        if candidates is None or candidates < 0:
            raise ValueError(
                f"`jacobi_candidates` must be an integer of at least 0, got {self.candidates!r}. Typical values are 1 "
                "to 4."
            )
        for name, value in (
            ("block_size", block_size),
            ("seed", seed),
            ("candidates", candidates),
            ("drafts", drafts),
        ):
            object.__setattr__(self, name, value)  # as Python's own, whatever kind of integer was passed
        if self.compile and self.candidates:
            raise ValueError(
                f"A compiled forward pass has one shape, got `jacobi_candidates={self.candidates}` with "
                '`jacobi_compile=True` or `cache_implementation="static"`. Drop one of the two.'
            )
        if self.compile and self.block_size == AUTO:
            raise ValueError(
                'A compiled forward pass has one shape, got `jacobi_block_size="auto"` with `jacobi_compile=True` or '
                '`cache_implementation="static"`. Pass an integer as `jacobi_block_size`.'
            )


def check_block_size(value: object, name: str = "jacobi_block_size", allows_auto: bool = False) -> Any:
    """Validate a block size."""
    if allows_auto and isinstance(value, str) and value == AUTO:
        return value
    size = as_integer(value)
    if size is not None and size >= 1:
        return size
    kinds = 'an integer of at least 1 or "auto"' if allows_auto else "an integer of at least 1"
    raise ValueError(f"`{name}` must be {kinds}, got {value!r}. Typical values are 8 to 64.")


def as_integer(value: Any) -> int | None:
    """Read an integer of any kind, such as numpy's."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def option_of(call: dict[str, Any], configs: Sequence[Any], name: str) -> Any:
    """Look up an option of `generate`."""
    return call[name] if call.get(name) is not None else first_set(configs, name)


def first_set(configs: Sequence[Any], name: str) -> Any:
    """Look up a default."""
    values = (getattr(config, name, None) for config in configs)
    return next((value for value in values if value is not None), None)
