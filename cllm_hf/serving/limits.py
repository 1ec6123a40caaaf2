"""What a request may ask of a server."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..options import AUTO, DEFAULT_BLOCK_SIZE


# A static cache is as long as the longest text that needed it, for all later requests. So that no request makes those
# of others dearer, all have this length where the server sets none; longer texts are decoded on a cache that grows.
_STATIC_LENGTH = 2048
_DEFAULT_NEW_TOKENS = 20  # of `generate`
_LARGEST_AUTO = 64  # block size that `"auto"` tries


@dataclass(frozen=True)
class ServingLimits:
    """
    What a request may ask of a server at most; by default anything.

    Attributes:
        max_new_tokens (`int`, *optional*): tokens of a response. A request that does not say how many it wants gets
            at most these.
        max_block_size (`int`, *optional*): positions that a forward pass checks, `jacobi_candidates` included.
        max_cache_length (`int`, *optional*): tokens of a prompt and its response together.

    Raises:
        ValueError: if one of them is not a positive integer.
    """

    max_new_tokens: int | None = None
    max_block_size: int | None = None
    max_cache_length: int | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"`{name}` must be an integer of at least 1, got {value!r}.")

    def apply(self, config: Any, default_config: Any, prompt_length: int, asks_for_length: bool) -> None:
        """
        Refuse what a request asks for, or bring what it did not ask for within the limits.

        Args:
            config (`transformers.GenerationConfig`): of the request; it may be changed.
            default_config (`transformers.GenerationConfig`): the model's.
            prompt_length (`int`): tokens of the prompt.
            asks_for_length (`bool`): whether the length of the response is the client's wish.

        Raises:
            ValueError: if the request goes beyond a limit.
        """
        self._apply_to_block(config, default_config)
        num_new = _num_new_tokens(config, default_config, prompt_length)
        allowed = num_new if self.max_new_tokens is None else min(num_new, self.max_new_tokens)
        if allowed < num_new and asks_for_length:
            raise ValueError(
                f"This server returns at most {self.max_new_tokens} tokens, got a request for {num_new}. Ask for less."
            )
        if self.max_cache_length is not None:
            rest = self.max_cache_length - prompt_length
            if rest < 1 or (rest < allowed and asks_for_length):
                raise ValueError(
                    f"This server takes at most {self.max_cache_length} tokens of prompt and response together, got a "
                    f"prompt of {prompt_length} and a request for {allowed}. Shorten the prompt, or ask for less."
                )
            allowed = min(allowed, rest)
        if allowed < num_new:
            config.max_new_tokens = allowed
        self._fix_static_cache(config, default_config, prompt_length + allowed)

    def _apply_to_block(self, config: Any, default_config: Any) -> None:
        asked, default = _block(config, default_config), _block(default_config, default_config)
        block_size, candidates = asked
        if self.max_block_size is None or block_size * (1 + candidates) <= self.max_block_size:
            return
        if asked != default or candidates:
            raise ValueError(
                f"This server checks at most {self.max_block_size} positions in a forward pass, got a request for "
                f"{block_size} with `jacobi_candidates={candidates}`. Ask for less."
            )
        config.jacobi_block_size = self.max_block_size

    def _fix_static_cache(self, config: Any, default_config: Any, length: int) -> None:
        bound = _STATIC_LENGTH if self.max_cache_length is None else self.max_cache_length
        asked = getattr(config, "max_cache_len", None) or 0
        if asked > bound:
            raise ValueError(
                f"This server makes static caches of at most {bound} tokens, got `max_cache_len={asked}`."
            )
        if length + (_block(config, default_config)[0] or DEFAULT_BLOCK_SIZE) > bound:
            config.jacobi_compile = False
            if "static" in (config.cache_implementation or "static"):  # the model's default may be one
                config.cache_implementation = "dynamic"
        elif any(_is_compiled(options) for options in (config, default_config)):
            config.cache_implementation, config.max_cache_len = "static", bound


def _is_compiled(config: Any) -> bool:
    return config.cache_implementation == "static" or bool(getattr(config, "jacobi_compile", False))


def _block(config: Any, default_config: Any) -> tuple[int, int]:
    """Positions of the largest block, and candidates."""
    found = []
    for name in ("jacobi_block_size", "jacobi_candidates"):
        value = getattr(config, name, None)
        value = getattr(default_config, name, None) if value is None else value
        found.append(_LARGEST_AUTO if value == AUTO else value if isinstance(value, int) else 0)
    return found[0], found[1]


def _num_new_tokens(config: Any, default_config: Any, prompt_length: int) -> int:
    """How many tokens `generate` makes at most."""
    for options in (config, default_config):
        for name, num_given in (("max_new_tokens", 0), ("max_length", prompt_length)):
            value = getattr(options, name, None)
            if value is None:
                continue
            if not isinstance(value, int):
                raise ValueError(f"`{name}` must be an integer, got {value!r}.")
            return max(value - num_given, 1)
    return _DEFAULT_NEW_TOKENS
