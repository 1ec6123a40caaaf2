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
_STARTS = frozenset(("select", "with"))
_STATEMENTS = _STARTS | frozenset("alter create delete drop explain insert pragma replace update values".split())
# Words that a query may go on with after an empty line. Any other one there begins a sentence.
_GOES_ON = _STARTS | frozenset(
    "and as cross except from full group having inner intersect join left limit natural offset on or order right "
    "union values where window".split()
)
# What a query cannot end with.
_UNFINISHED = _GOES_ON | frozenset(
    "by distinct all not in like is between case when then else , ( = < > + - / .".split()
)
_FENCE = re.compile(r"^[ \t]*(?:`{3,}|~{3,})[ \t]*\w*[ \t]*$\n?", re.MULTILINE)
_LINE_START = re.compile(
    r"^[ \t]*(?:\*{0,2}[A-Za-z]+(?: [A-Za-z]+)?:\*{0,2} )?[ \t]*(?=(?:select|with)\s)", re.I | re.MULTILINE
)
_CODE_SPAN = re.compile(r"`((?:select|with)\s[^`]*)`", re.IGNORECASE)


def extract_query(text: str) -> str:
    """
    Take the query out of what an instruct model writes around it.

    A text that begins with a query, as all do of a model that was trained on queries alone, loses only a sentence that
    comes after a semicolon or an empty line. Otherwise the query is that of the first block between code fences that
    begins with `SELECT` or `WITH`, closed or cut off; else the first line that begins so, after a label such as `SQL:`
    too; else the first such piece of code in a line.

    Args:
        text (`str`): a response.

    Returns:
        `str`: the query; the text as it is if it has none, or more than 100,000 characters.
    """
    if len(text) > MAX_QUERY_LENGTH:
        return text
    before, *blocks = _FENCE.split(text)
    if _first_word(text) in _STARTS:
        return _without_sentence(before)
    for block in blocks[::2]:
        if _first_word(block) in _STARTS:
            return block.strip()
    line = _LINE_START.search(text)
    if line is not None:
        return _without_sentence(_FENCE.split(text[line.end() :])[0])
    span = _CODE_SPAN.search(text)
    return text if span is None else span[1]


def _first_word(text: str) -> str:
    return next((word.lower() for kind, word in split_sql(text) if kind not in _BLANK and word != "("), "")


def _without_sentence(query: str) -> str:
    """Cut at the first semicolon or empty line after which something comes that is no SQL."""
    last = ""
    position = 0
    for kind, text in split_sql(query):
        is_end = text == ";" or (kind == "space" and text.count("\n") > 1 and last not in _UNFINISHED)
        if is_end:
            word = _first_word(query[position + len(text) :])
            if word.isalpha() and word not in (_STATEMENTS if text == ";" else _GOES_ON):
                return query[:position]
        if kind not in _BLANK:
            last = text.lower()
        position += len(text)
    return query


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
