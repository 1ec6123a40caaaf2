"""The options of a collection, checked."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..options import as_integer, check_block_size
from .cleaning import CleaningRules


DEFAULT_TOKENS_PER_BATCH = 16384


@dataclass(frozen=True)
class CollectionOptions:
    """
    What decides which records come out of prompts, whatever the machine; `TrajectoryBuilder` says what each means.

    Raises:
        ValueError: for a value of the wrong kind or out of range.
    """

    block_size: int = 16
    max_new_tokens: int = 512
    seed: int = 0
    max_tokens_per_batch: int = DEFAULT_TOKENS_PER_BATCH
    prompts_per_shard: int = 1000
    augment: bool = False
    test_fraction: float = 0.0
    cleaning: CleaningRules = field(default_factory=CleaningRules)
    drop_duplicates: bool = True
    not_greedy: str = "drop"

    def __post_init__(self) -> None:
        counts = {"block_size": check_block_size(self.block_size, "block_size")}
        for name, least in (("max_new_tokens", 1), ("max_tokens_per_batch", 1), ("prompts_per_shard", 1), ("seed", 0)):
            value = as_integer(getattr(self, name))
            if value is None or value < least:
                raise ValueError(f"`{name}` must be an integer of at least {least}, got {getattr(self, name)!r}.")
            counts[name] = value
        for name, value in counts.items():
            object.__setattr__(self, name, value)  # as Python's own, ready for JSON
        for name in ("augment", "drop_duplicates"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"`{name}` must be `True` or `False`, got {getattr(self, name)!r}.")
        if isinstance(self.test_fraction, bool) or not isinstance(self.test_fraction, (int, float)):
            raise ValueError(f"`test_fraction` must be a number, got {self.test_fraction!r}.")
        if not 0 <= self.test_fraction < 1:
            raise ValueError(f"`test_fraction` must be at least 0 and below 1, got {self.test_fraction}.")
        if not isinstance(self.cleaning, CleaningRules):
            raise ValueError(f"`cleaning` must be `cllm_hf.CleaningRules`, got {self.cleaning!r}.")
        if self.not_greedy not in ("drop", "keep"):
            raise ValueError(f'`not_greedy` must be "drop" or "keep", got {self.not_greedy!r}.')

    @property
    def splits(self) -> tuple[str, ...]:
        """`tuple[str, ...]`: the splits that the records go to; the first one is written last."""
        return ("train", "test") if self.test_fraction else ("train",)

    def to_dict(self) -> dict[str, Any]:
        """
        The options by name, as a manifest has them.

        Returns:
            `dict`, ready for JSON.
        """
        return {**vars(self), "cleaning": self.cleaning.to_dict()}
