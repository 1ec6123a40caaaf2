"""
What `mkdocs` is told beside `mkdocs.yml`: files outside of `docs/` that pages link to belong to the site, and types in
docstrings of transformers' format, which have backticks of their own, are shown without them.

A link such as `../examples/stories.py` leads to the file where the repository is read as it is. In the site the file
lies at the same path below the pages, so that `../` is taken out of the link. Markdown files become pages.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files


_ROOT = Path(__file__).parent.parent
_OUTSIDE = re.compile(r"(?<=\]\()\.\./(?=[^)\s]+\))")
_TYPE = re.compile(r"(?<=\(<code>)[^<]*(?=</code>)")
_TARGET = re.compile(r"\]\(\.\./([^)#\s]+)[^)]*\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the files outside that a page or the navigation names."""
    names = {"CHANGELOG.md"}
    for file in files.documentation_pages():
        names.update(_TARGET.findall(file.content_string))
    for name in sorted(names):
        if (_ROOT / name).is_file():  # otherwise the link is broken, and a strict build says so
            files.append(File.generated(config, name, abs_src_path=str(_ROOT / name)))
    return files


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Lead links to files outside to where they lie in the site."""
    return _OUTSIDE.sub("", markdown)


def on_page_content(html: str, **kwargs: Any) -> str:
    """Show types of parameters without the backticks and asterisks of their docstrings."""
    return _TYPE.sub(lambda type_: re.sub(r"[`*]", "", type_[0]), html)
