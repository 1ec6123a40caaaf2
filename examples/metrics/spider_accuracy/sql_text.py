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
_STATEMENTS = frozenset("select with alter create delete drop explain insert pragma replace update values".split())
# Words that a query may go on with after an empty line. Any other one there begins a sentence.
_GOES_ON = frozenset(
    "and as cross except from full group having inner intersect join left limit natural offset on or order right "
    "select union values where window with".split()
)
# What a query cannot end with.
_UNFINISHED = _GOES_ON | frozenset(
    "by distinct all not in like is between case when then else , ( = < > + - / .".split()
)
_FENCE = re.compile(r"^[ \t]*(?:`{3,}|~{3,})[ \t]*\w*[ \t]*$\n?", re.MULTILINE)
_WITH = r"with\s+(?:recursive\s+)?[^\s,;:()]+\s*(?:\([^()]*\)\s*)?as\b"
_QUERY_START = re.compile(rf"select\s|{_WITH}", re.IGNORECASE)
# At the beginning of a line, a number in a list, asterisks and a label such as `SQL:` may stand before a query; else
# any words and a colon, as in `Here is the query: SELECT ...`.
_LINE_STARTS = [
    re.compile(rf"^[ \t]*(?:\d+[.)] )?(?:{label})?[ \t*]*(?=select\s|{_WITH})", re.IGNORECASE | re.MULTILINE)
    for label in (r"\*{0,2}[A-Za-z]+(?: [A-Za-z]+)?:\*{0,2} ", r"[^\n:]{1,100}:[ \t]+")
]
# What SQL neither begins nor goes on with after a query: marks of Markdown, and a sentence with a label.
_MARKDOWN = re.compile(r"[*#`]|-(?!-)|\d+[.)]\s")
_LABEL = re.compile(r"[A-Za-z][A-Za-z ]{0,30}:(?=\s)")
_CODE_SPAN = re.compile(r"`((?:select|with)\s[^`]*)`", re.IGNORECASE)


def extract_query(text: str) -> str:
    """
    Take the query out of what an instruct model writes around it.

    A text that begins with a query, as all do of a model that was trained on queries alone, loses only what is no SQL
    after a semicolon or an empty line, and a line with a label such as `Explanation:`. Otherwise the query is that of
    the first block between code fences that begins with `SELECT` or `WITH name AS`, closed or cut off; else the first
    line that begins so, in a list or after a label such as `SQL:` too; else what comes after words and a colon; else
    the first such piece of code in a line.

    Args:
        text (`str`): a response.

    Returns:
        `str`: the query; the text as it is if it has none, or more than 100,000 characters.
    """
    if len(text) > MAX_QUERY_LENGTH:
        return text
    before, *blocks = _FENCE.split(text)
    if _begins_query(text):
        return _without_sentence(before)
    for block in blocks[::2]:
        if _begins_query(block):
            return block.strip()
    for start in _LINE_STARTS:
        line = start.search(text)
        if line is not None:
            query = _without_sentence(_FENCE.split(text[line.end() :])[0])
            return query.rstrip().removesuffix("**") if line[0].endswith("**") else query
    span = _CODE_SPAN.search(text)
    return text if span is None else span[1]


def _begins_query(text: str) -> bool:
    return _QUERY_START.match(_from_first_word(text)) is not None


def _from_first_word(text: str) -> str:
    """A text without the spaces, comments and brackets that it begins with."""
    position = 0
    for kind, part in split_sql(text):
        if kind not in _BLANK and part != "(":
            break
        position += len(part)
    return text[position:]


def _without_sentence(query: str) -> str:
    """Cut at the first semicolon or line end after which something comes that is no SQL."""
    last = ""
    position = 0
    for kind, text in split_sql(query):
        after = position + len(text)
        is_end = text == ";" or (kind == "space" and text.count("\n") > 1 and last not in _UNFINISHED)
        if is_end and _is_no_sql(query[after:], _STATEMENTS if text == ";" else _GOES_ON):
            return query[:position]
        if kind == "space" and "\n" in text and _LABEL.match(query, after):
            return query[:position]
        if kind not in _BLANK:
            last = text.lower()
        position = after
    return query


def _is_no_sql(text: str, words: frozenset[str]) -> bool:
    """Whether what comes after a query is neither SQL that begins with one of these words, nor anything in signs."""
    if _MARKDOWN.match(text.lstrip()):
        return True
    text = _from_first_word(text)
    word = re.match(r"\w*", text)[0].lower()  # type: ignore[index]  # matches anything
    return word.isalpha() and (word not in words or (word == "with" and not _QUERY_START.match(text)))


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
