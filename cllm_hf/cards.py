"""Markdown: what the cards of models and of datasets share, and tables of reports."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any


# What stands between the mark that begins a section and this one is ours; the rest belongs to those who wrote it.
END = "<!-- cllm_hf: end -->"
CLLM_CITATION = """\
@inproceedings{kou2024cllms,
    title     = {{CLLMs: Consistency Large Language Models}},
    author    = {Siqi Kou and Lanxiang Hu and Zhezhi He and Zhijie Deng and Hao Zhang},
    booktitle = {International Conference on Machine Learning},
    year      = 2024,
    url       = {https://arxiv.org/abs/2403.00835},
}"""
MASKS_CITATION = """\
@misc{samragh2025your,
    title         = {{Your LLM Knows the Future: Uncovering Its Multi-Token Prediction Potential}},
    author        = {Mohammad Samragh and Arnav Kundu and David Harrison and Kumari Nishu and Devang Naik and
                     Minsik Cho and Mehrdad Farajtabar},
    year          = 2025,
    eprint        = {2507.11851},
    archiveprefix = {arXiv},
}"""
# The Hub takes no other identifiers, https://huggingface.co/docs/hub/repositories-licenses.
LICENSES = frozenset(
    """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
    lgpl lgpl-2.1 lgpl-3.0 isc intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openrail++
    osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
    fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 gemma unknown other
    """.split()
)


def license_metadata(licenses: Sequence[str]) -> dict[str, Any]:
    """`license`, or nothing without any; and `license_name` for licenses that the Hub does not know."""
    known = [license.lower() for license in licenses if license.lower() in LICENSES]
    unknown = [license for license in licenses if license.lower() not in LICENSES]
    metadata: dict[str, Any] = {}
    if unknown:
        known = [*known, "other"]
        name = re.sub(r"[^a-z0-9.]+", "-", " ".join(unknown).lower()).strip("-")
        metadata["license_name"] = name or "unnamed"
    if known:
        metadata["license"] = known if len(known) > 1 else known[0]
    return metadata


def join_tags(earlier: Any, new: Sequence[str]) -> list[str]:
    """The tags of an earlier card's metadata, which may be one text, and then new ones; each once."""
    tags = [earlier] if isinstance(earlier, str) else list(earlier or [])
    return list(dict.fromkeys([*tags, *new]))


def renew_section(earlier: str, section: str, begin: str) -> str | None:
    """
    Put a section of ours, which begins with the mark `begin` and ends with `END`, in place of an earlier one; the text
    outside the marks stays. `None` if there is no such section.
    """
    if begin not in earlier:
        return None
    before, rest = earlier.split(begin, 1)
    return before + section + rest.split(END, 1)[1] if END in rest else None


def is_ours_alone(card: str, begin: str) -> bool:
    """Whether a card is our section, which begins with the mark `begin`, and nobody has written around it."""
    rest = renew_section(card, "", begin)
    return rest is not None and not re.sub(r"\A\s*---\n.*?\n---(\n|\Z)", "", rest, flags=re.DOTALL).strip()


def quoted(text: str) -> str:
    """
    A text as it stands in Python code, in double quotes and on one line, with nothing that cannot be seen and no
    backtick or `<`, which may end a block of code of a card or begin a mark of ours.
    """
    return '"' + "".join(map(_escaped, text)) + '"'


def _escaped(character: str) -> str:
    if character in '"\\':
        return f"\\{character}"
    if character.isprintable() and character not in "`<":
        return character
    number = ord(character)
    return f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}" if number < 1 << 16 else f"\\U{number:08x}"


def plain(text: object) -> str:
    """A text of somebody else as Markdown that shows it as it is, on one line, whatever markup is in it."""
    line = _one_line(text)
    line = re.sub(r"[\\`*\[\]~$]|(?<![^\W_])_|_(?![^\W_])|^[#>+-]|#$", r"\\\g<0>", line)
    line = re.sub(r"&(?=#?\w+;)", "&amp;", line)
    return line.replace("<", "&lt;")


def code(text: object) -> str:
    """A text of somebody else as a piece of code in a line of Markdown, between as many backticks as it takes."""
    line = _one_line(text).replace("<!--", "<!- -")  # code too must not look like a mark of ours
    if not line:
        return "` `"
    ticks = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    space = " " if "`" in (line[0], line[-1]) else ""
    return f"{ticks}{space}{line}{space}{ticks}"


def _one_line(text: object) -> str:
    words = " ".join(str(text).split())
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in words)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose cells take no more room than they need, for a page that a browser lays out."""
    lines = (header, ("---",) * len(header), *rows)
    return "\n".join(f"| {' | '.join(map(_escape_bars, cells))} |" for cells in lines)


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table; the first column is aligned on the left, the others on the right."""
    header, *rows = [[_escape_bars(" ".join(cell.splitlines())) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first = cells[0].ljust(widths[0])
        return "| " + " | ".join([first, *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:]))]) + " |"

    rule = "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])])
    return "\n".join([line(header), f"|{rule}|", *map(line, rows)])


def _escape_bars(cell: str) -> str:
    """The Markdown of a cell of a table with a backslash before each `|` that has none, which so ends no cell."""
    return re.sub(r"(?<!\\)((?:\\\\)*)\|", r"\1\\|", cell)
