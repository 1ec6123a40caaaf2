"""SQL as a row of words: what can be said of a query without understanding it."""

from __future__ import annotations

import re
from collections.abc import Iterator


# A literal that is not ended reaches to the end of the query, as it does in SQLite.
_TOKEN = re.compile(
    r"""
      (?P<space> \s+ )
    | (?P<comment> --[^\n]* | /\*.*?(?:\*/|\Z) )
    | (?P<quoted> '(?:[^']|'')*(?:'|\Z) | "(?:[^"]|"")*(?:"|\Z) | `(?:[^`]|``)*(?:`|\Z) | \[[^\]]*(?:\]|\Z) )
    | (?P<word> \w+ )
    | (?P<sign> . )
    """,
    re.VERBOSE | re.DOTALL,
)
_SPLIT_OPERATORS = {(">", "="), ("<", "="), ("!", "=")}


def split_sql(query: str) -> Iterator[tuple[str, str]]:
    """
    Split a query.

    Args:
        query (`str`): SQL, also such that is not well formed.

    Yields:
        `tuple[str, str]`: kind (`"space"`, `"comment"`, `"quoted"`, `"word"` or `"sign"`, which is one character) and
            text.
        The texts together are the query.
    """
    for match in _TOKEN.finditer(query):
        yield str(match.lastgroup), match.group()


def has_order_by(query: str) -> bool:
    """
    Whether a query orders rows, at any depth.

    Args:
        query (`str`): SQL.

    Returns:
        `bool`: whether the words `ORDER BY`, in any case, stand outside of quotes and comments.
    """
    words = [text.lower() for kind, text in split_sql(query) if kind not in ("space", "comment")]
    return ("order", "by") in zip(words, words[1:])


def join_operators(query: str) -> str:
    """
    Close the gap in operators that a model has written in two pieces, such as `> =`.

    Args:
        query (`str`): SQL.

    Returns:
        `str`: the query with `>=`, `<=` and `!=`, outside of quotes.
    """
    tokens = list(split_sql(query))
    kept = []
    for index, (kind, text) in enumerate(tokens):
        is_gap = kind == "space" and 0 < index < len(tokens) - 1
        if not (is_gap and (tokens[index - 1][1], tokens[index + 1][1]) in _SPLIT_OPERATORS):
            kept.append(text)
    return "".join(kept)


def without_distinct(query: str) -> str:
    """
    Take out every `DISTINCT`.

    Args:
        query (`str`): SQL.

    Returns:
        `str`: the query without the word, outside of quotes and comments.
    """
    return "".join(text for kind, text in split_sql(query) if not (kind == "word" and text.lower() == "distinct"))
