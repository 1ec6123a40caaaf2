"""Numbers as people and models write them, in plain text, Markdown and LaTeX."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from fractions import Fraction


# No answer has this many digits; Python takes long over integers of many, and reads none of more than 4300.
_MAX_DIGITS = 40
_VULGAR = "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅐⅛⅜⅝⅞⅑⅒"
_SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺"
_LOWERED = str.maketrans(_SUPERSCRIPTS, "0123456789-+")
_WRITTEN: dict[str, str | int | None] = {
    **dict.fromkeys("‐‑‒–—―−﹣－", "-"),
    **dict.fromkeys("⁄∕／", "/"),
    **dict.fromkeys("\u00a0\u2005\u2006\u2007\u2008\u2009\u200a\u202f", "\u2009"),
    **dict.fromkeys("\u200b\u200c\u200d\u2060\u2063\ufeff", None),
    **dict(zip("０１２３４５６７８９．，＄％＋（）：＝", "0123456789.,$%+():=")),
    "’": "'",
    "×": "*",
    "·": "*",
    "⋅": "*",
    # A fraction of one character: `3½` is a mixed number, `-½` has its sign right before it.
    **{symbol: f"\u2063{unicodedata.normalize('NFKC', symbol)} ".replace("⁄", "/") for symbol in _VULGAR},
}
_CHARACTERS = str.maketrans(_WRITTEN)
_INTEGER = r"[0-9](?:[0-9]|,(?=[0-9]{3})){0,25}"
# A space between thousands, where a group begins with a zero: no number of its own does.
_SPACED = re.compile(r"(?<![0-9.,])[1-9][0-9]{0,2}(?: [0-9]{3}){0,4} 0[0-9]{2}(?: [0-9]{3}){0,4}(?![0-9])")
# Replaced in this order. All are bounded where they repeat, so that they take time in proportion to the text.
_REPLACEMENTS = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"<<[^<>\n]*>>", " "),  # a calculation of the data set
        (r"\\([$%&#])", r"\1"),
        (r"\\(?:times|cdot)(?![A-Za-z])", "*"),
        (r"\\(?:text|mathrm|mbox)\s?\{,\}|\{(?:\\?,|,\\!)\}|,\\!", ","),
        # Between three digits and what is before them, all of these stand for the comma.
        (r"(?<=[0-9])(?:\\[,!;: ]|\\thinspace ?|~|\u2009|'|_)(?=[0-9]{3}(?![0-9]))", ","),
        (r"\\[,!;:]|\\ |\u2009|~", " "),
        (r"(?<=[0-9])\u2063", " "),
        (r"\u2063", ""),
        (
            rf"(?<=[0-9])\s?\\[a-z]{{0,5}}frac\s?(?:\{{\s?({_INTEGER})\s?\}}|([0-9]))\s?(?:\{{\s?({_INTEGER})\s?\}}|([0-9]))",
            r" \1\2/\3\4 ",
        ),
        (
            rf"\\[a-z]{{0,5}}frac\s?(?:\{{\s?(-?\s?{_INTEGER})\s?\}}|([0-9]))\s?(?:\{{\s?({_INTEGER})\s?\}}|([0-9]))",
            r"\1\2/\3\4 ",
        ),
        (rf"(?<![0-9])({_INTEGER})\s?\\over\s?(?={_INTEGER})", r"\1/"),
        # Bold numbers; not the power of `2**3`.
        (r"(?<![0-9)])(?:\*\*|__)(?=[-+$€£¥₹0-9.\\])|(?<=[0-9%.])(?:\*\*|__)(?![0-9])", ""),
        (r"(?<=[0-9])\s?[*x]\s?10\s?\^\s?(?:\{\s?([-+]?[0-9]{1,9})\s?\}|([-+]?[0-9]{1,9}))", r"e\1\2"),
        (r"(?<![\w.^])10\s?\^\s?(?:\{\s?([-+]?[0-9]{1,9})\s?\}|([-+]?[0-9]{1,9}))", r"1e\1\2"),
        # What else is raised or lowered is part of a unit or a name: `18 m^2`, `x_1`.
        (r"\^\s?(?:\{[-+]?[0-9]{1,9}\}|[-+]?[0-9]{1,9})", " "),
        (r"(?<=[A-Za-z})\]])_(?:\{[0-9]{1,9}\}|[0-9]{1,9})(?![0-9])", " "),
        (r"(?<![^\W_])((?:mm|cm|dm|km|m|ft|in|yd|mi))[23](?![^\W_])", r"\1"),
    )
]
_RAISED = re.compile(f"[{_SUPERSCRIPTS}]+")
_WHOLE = r"""
    (?: [0-9]{1,3} (?:,[0-9]{3})+ (?![0-9])
      | [0-9]{1,2} (?:,[0-9]{2}){1,9} ,[0-9]{3} (?![0-9])           # 1,00,000 as in India
      | [0-9]+ )
"""
_NUMBER = re.compile(
    rf"""
    (?P<sign>
        (?<![^\W_]) (?<![)\]%.-]) [-+]                          # touches its number; not the minus of 16-3
      | (?: (?<=[=<>≈(\[{{:/$]) | (?<=[=<>≈(\[{{:/$][ ]) ) [-+][ ]  # `= - 3`; else a dash and a space are none
      | (?<![^\W_]) [Nn]egative[ ]
    )?
    (?: (?<![A-Za-z]) (?:US|CA|AU|A|C)? [$€£¥₹] (?P<inner_sign> - )? [ ]? )?
    (?: (?P<mixed> [0-9]+ ) (?: [ ]and )? [ ]{{1,2}} (?=[0-9]+/[0-9]) )?     # the 1 of 1 1/2
    (?: (?P<numerator> {_WHOLE} ) / (?P<denominator> {_WHOLE} ) (?! [0-9/] | \.[0-9] )
      | (?P<dotted> [1-9][0-9]{{0,2}} (?: (?:\.[0-9]{{3}}){{2,}} (?:,[0-9]{{1,2}})? | \.[0-9]{{3}},[0-9]{{2}} ) )
        (?! [0-9] | [,.][0-9] )                               # 1.234.567 or 1.234,56
      | (?P<decimal> {_WHOLE} (?:\.[0-9]+)? | (?<![A-Za-z])\.[0-9]+ )
        (?: [eE](?P<exponent> [-+]?[0-9]+ ) (?![^\W_]) )? )
    """,
    re.VERBOSE,
)


def plain_numbers(text: str) -> str:
    """
    Write all numbers of a text in one way: `\\frac{1}{2}` as `1/2`, `9{,}500` as `9,500`, `10^3` as `1e3`.

    Args:
        text (`str`): plain text, Markdown or LaTeX.

    Returns:
        `str`: in which `find_numbers` finds them. Calculations in `<<...>>`, exponents and indices are left out.
    """
    text = _RAISED.sub(lambda raised: "^" + raised.group().translate(_LOWERED), text)
    text = text.translate(_CHARACTERS)
    for pattern, replacement in _REPLACEMENTS:
        text = pattern.sub(replacement, text)
    return _SPACED.sub(lambda number: number.group().replace(" ", ","), text)


def find_numbers(text: str, start: int = 0) -> Iterator[re.Match[str]]:
    """
    Find numbers, their signs and currency signs.

    A minus touches its number or its currency sign, or comes after a sign such as `=`, `(` or `:`. A dash with a space
    after it is a bullet or a pause otherwise.

    Args:
        text (`str`): result of `plain_numbers`.
        start (`int`): where to begin.

    Yields:
        `re.Match`: what `read_number` reads.
    """
    return _NUMBER.finditer(text, start)


def read_number(number: re.Match[str]) -> Fraction | None:
    """
    Read a number.

    Args:
        number (`re.Match`): result of `find_numbers`.

    Returns:
        `fractions.Fraction`, *optional*: `None` for a fraction over zero and for more than 40 digits.
    """
    parts = [(number[name] or "").replace(",", "") for name in ("decimal", "numerator", "denominator", "mixed")]
    decimal, numerator, denominator, mixed = parts
    if number["dotted"]:
        decimal = number["dotted"].replace(".", "").replace(",", ".")
    exponent = number["exponent"] or "0"
    if max(map(len, (*parts, decimal))) > _MAX_DIGITS or len(exponent) > 4 or abs(int(exponent)) > _MAX_DIGITS:
        return None
    if numerator and int(denominator) == 0:
        return None
    value = (
        Fraction(int(numerator), int(denominator)) if numerator else Fraction(decimal) * Fraction(10) ** int(exponent)
    )
    value += int(mixed or 0)
    is_negative = "+" not in (number["sign"] or "+") or number["inner_sign"] is not None
    return -value if is_negative else value
