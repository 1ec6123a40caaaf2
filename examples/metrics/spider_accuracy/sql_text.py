"""SQL as a row of words: what can be said of a query without understanding it."""

from __future__ import annotations

import re
from collections.abc import Iterator


# A literal that is not ended reaches to the end of the query, as it does in SQLite.
_TOKEN = re.compile(
    r"""
      (?P<space> \s+ )
    | (?P<comment> --[^\n]* | /\*.*?(?:\*/|\Z) )
    | (?P<quoted> '[^']*(?:''[^']*)*(?:'|\Z) | "[^"]*(?:""[^"]*)*(?:"|\Z) | `[^`]*(?:``[^`]*)*(?:`|\Z)
        | \[[^\]]*(?:\]|\Z) )
    | (?P<word> \w+ )
    | (?P<sign> . )
    """,
    re.VERBOSE | re.DOTALL,
)
_SPLIT_OPERATORS = {(">", "="), ("<", "="), ("!", "=")}
# Characters of a longer query are not looked at. The longest of Spider has 577.
MAX_QUERY_LENGTH = 100_000
_BLANK = ("space", "comment")


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
    words = [text.lower() for kind, text in split_sql(query) if kind not in _BLANK]
    return ("order", "by") in zip(words, words[1:])


def without_empty_statements(query: str) -> str:
    """
    Leave out semicolons, and what stands after them, where that is no further statement.

    Args:
        query (`str`): SQL.

    Returns:
        `str`: the one statement without its semicolon; the query as it is if it has none or several.
    """
    statements: list[list[tuple[str, str]]] = [[]]
    for kind, text in split_sql(query):
        if text == ";":
            statements.append([])
        else:
            statements[-1].append((kind, text))
    full = [tokens for tokens in statements if any(kind not in _BLANK for kind, _ in tokens)]
    return "".join(text for _, text in full[0]) if len(full) == 1 else query


def without_comments(query: str) -> str:
    """
    Take out every comment.

    Args:
        query (`str`): SQL.

    Returns:
        `str`: the query with a space in place of each.
    """
    return "".join(" " if kind == "comment" else text for kind, text in split_sql(query))


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
        `str`: the query without the word, outside of quotes and comments; the operators `IS DISTINCT FROM` and `IS NOT
            DISTINCT FROM` stay.
    """
    tokens = list(split_sql(query))
    words = [(place, text.lower()) for place, (kind, text) in enumerate(tokens) if kind not in _BLANK]
    left_out = set()
    for index, (place, word) in enumerate(words):
        if word != "distinct" or tokens[place][0] != "word":
            continue
        before = [earlier for _, earlier in words[max(index - 2, 0) : index]]
        after = [later for _, later in words[index + 1 : index + 2]]
        if not (after == ["from"] and (before[-1:] == ["is"] or before == ["is", "not"])):
            left_out.add(place)
    return "".join(text for place, (_, text) in enumerate(tokens) if place not in left_out)
