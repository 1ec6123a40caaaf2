"""One word for an idea: code and documents say it in the field's terms."""

import io
import re
import tokenize
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULES = sorted([*(ROOT / "cllm_hf").rglob("*.py"), *(ROOT / "examples").rglob("*.py")])
# What is not said, and what is said instead.
WORDS = {
    r"\bfrom nothing\b": "from scratch",
    r"\b(a|one|the|each|every|next|last|first|single|bare) forward\b(?! pass| hook|-)": "forward pass",
    r"(?<![-\w])forwards\b(?!=)": "forward passes",
    r"\b(an|each|every|one) update\b": "optimizer step",
    r"\bupdates of\b": "optimizer steps",
    r"\boptions? that there (is|are) not\b": "unknown option",
    r"\bthe host('s\b|\b)(?! (libraries|packages))": "transformers",
    r"\b(stands?|token|tokens|after|lies|word) behind\b": "after",
}


def prose(path):
    """What people read in a file, without names of code."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        return re.sub(r"`[^`\n]*`|^    .*$", "", text, flags=re.MULTILINE)
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    parts = [
        token.string
        for token in tokens
        if token.type == tokenize.COMMENT or (token.type == tokenize.STRING and " " in token.string)
    ]
    return re.sub(r"`[^`\n]*`|\{[^{}\n]*\}|^ *\w+ \(|\w+_forwards", "", "\n".join(parts), flags=re.MULTILINE)


@pytest.mark.parametrize("word", WORDS)
def test_old_words_are_not_used(word):
    found = {}
    for path in [*PAGES, *MODULES]:
        matches = [match.group(0) for match in re.finditer(word, prose(path))]
        if matches:
            found[str(path.relative_to(ROOT))] = matches
    assert not found, f"Write {WORDS[word]!r} instead."
