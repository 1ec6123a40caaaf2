"""Which responses are left out of a dataset because they would teach the model to repeat itself, or nothing."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import groupby
from typing import Any

from ..options import as_integer


# A period within a number, a name or an address ends no sentence. After one that does, a space may be missing.
_SENTENCE_END = re.compile(r"[!?！？。｡।؟…\n]|\.(?!\w)|(?<=[a-z])\.(?=[A-Z])|．(?!\d)")
# Nor does one after a title, or after what is written short in the middle of a sentence.
_ABBREVIATION = re.compile(r"\b(?:(?:Mr|Mrs|Ms|Dr|Prof|St)\.(?=\s+[A-Z])|(?:vs|approx|e\.g|i\.e)\.)")
_WORDS = re.compile(r"\w(?:.*\w)?")
_SHORTEST_SENTENCE = 10


@dataclass(frozen=True)
class CleaningRules:
    """
    Which responses `TrajectoryBuilder` drops.

    A model that falls into a loop makes long trajectories of the loop, and training on them makes it collapse to few
    tokens. The authors of CLLM (arXiv 2403.00835) drop responses with a long run of one token, and advise to look for
    repeated sentences too. Set a rule to `None` or `False` to do without it.

    Args:
        max_token_run (`int`, *optional*, defaults to 10): a response is dropped in which one token stands this many
            times or more in a row. Stop tokens and padding within it are tokens as all others.
        max_sentence_repeats (`int`, *optional*, defaults to 3): a response is dropped in which one sentence stands
            more than this many times, anywhere in it: with 3, the fourth time is too much. A sentence goes to the next
            `.`, `!`, `?`, line end or their like in other scripts; a period within a number or a name (`3.5`,
            `example.com`) or after a title (`Mr.`) ends none. Case, spaces, and signs around it make no difference,
            and those of less than 10 characters do not count. Lines of program code are sentences too: for code take a
            larger number or `None`.
        drop_empty (`bool`, defaults to `True`): whether a response is dropped that has no tokens but stop tokens, or
            only white space as text.
        drop_truncated (`bool`, defaults to `False`): whether a response is dropped that does not end in a stop token,
            because it was cut at `max_new_tokens`. Its blocks converge as all others; the model does not learn to end
            from it.
        max_prompt_tokens (`int`, *optional*): prompts of more tokens are dropped, before they get a response.

    Raises:
        ValueError: for a value of the wrong kind or out of range.
    """

    max_token_run: int | None = 10
    max_sentence_repeats: int | None = 3
    drop_empty: bool = True
    drop_truncated: bool = False
    max_prompt_tokens: int | None = None

    def __post_init__(self) -> None:
        # A run of one token is every token.
        for name, least in (("max_token_run", 2), ("max_sentence_repeats", 1), ("max_prompt_tokens", 1)):
            given = getattr(self, name)
            value = as_integer(given)
            if given is not None and (value is None or value < least):
                raise ValueError(
                    f"`{name}` must be an integer of at least {least}, or `None` for no such rule, got {given!r}."
                )
            object.__setattr__(self, name, value)  # as Python's own, ready for JSON
        for name in ("drop_empty", "drop_truncated"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"`{name}` must be `True` or `False`, got {getattr(self, name)!r}.")

    @classmethod
    def from_options(cls, options: Any) -> CleaningRules:
        """
        Make the rules of options that have the same names, such as those of a command.

        Args:
            options (`Any`): where 0 as `max_token_run` or `max_sentence_repeats` is no such rule: a number is easier
                to write than `None`.

        Returns:
            `CleaningRules`.

        Raises:
            ValueError: as the class.
        """
        values = {field.name: getattr(options, field.name) for field in fields(cls)}
        return cls(**{**values, **{name: values[name] or None for name in ("max_token_run", "max_sentence_repeats")}})

    def reason_to_drop(self, response_ids: Sequence[int], text: str, stop_ids: Collection[int]) -> str | None:
        """
        Say whether a response is to be dropped, and why.

        Args:
            response_ids (`Sequence[int]`): its tokens, the stop token included.
            text (`str`): the same as text, without special tokens.
            stop_ids (`Collection[int]`): tokens that end a response; without any, all responses are truncated.

        Returns:
            `str` or `None`: the first of `"empty"`, `"truncated"`, `"token_repetition"`, `"sentence_repetition"` that
            is true of it and that a rule forbids, or `None` if it is kept.
        """
        if self.drop_empty and (not text.strip() or all(token in stop_ids for token in response_ids)):
            return "empty"
        if self.drop_truncated and (not len(response_ids) or response_ids[-1] not in stop_ids):
            return "truncated"
        if self.max_token_run is not None and longest_run(response_ids) >= self.max_token_run:
            return "token_repetition"
        if self.max_sentence_repeats is not None and most_repeats(text) > self.max_sentence_repeats:
            return "sentence_repetition"
        return None

    def to_dict(self) -> dict[str, Any]:
        """
        The rules by name, as a dataset's manifest has them.

        Returns:
            `dict`: `CleaningRules(**rules.to_dict())` are the same rules.
        """
        return asdict(self)


KEEP_ALL = CleaningRules(max_token_run=None, max_sentence_repeats=None, drop_empty=False)


def longest_run(token_ids: Sequence[int]) -> int:
    """
    Length of the longest run of one token.

    Args:
        token_ids (`Sequence[int]`): tokens.

    Returns:
        `int`: 0 without tokens.
    """
    return max((sum(1 for _ in run) for _, run in groupby(token_ids)), default=0)


def most_repeats(text: str) -> int:
    """
    How often the most frequent sentence stands in a text; `CleaningRules` says what a sentence is.

    Args:
        text (`str`): the text.

    Returns:
        `int`: 0 without sentences of at least 10 characters.
    """
    whole = _ABBREVIATION.sub(lambda match: match[0].replace(".", " "), text)
    found = (_WORDS.search(" ".join(part.casefold().split())) for part in _SENTENCE_END.split(whole))
    counts = Counter(words[0] for words in found if words and len(words[0]) >= _SHORTEST_SENTENCE)
    return max(counts.values(), default=0)
