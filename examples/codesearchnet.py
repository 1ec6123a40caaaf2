"""
CodeSearchNet, Python: functions from their documentation.

    python examples/codesearchnet.py all
    python examples/codesearchnet.py all --data DIR --config examples/configs/codesearchnet-gpu.yaml

The data are `code-search-net/code_search_net` from the Hub, or a folder with `train.jsonl` and `test.jsonl`, an object
a line with `docstring` and `code`. A prompt is the documentation as a comment, the response the function without it.
There are no tests to run the functions with, so the report is on speed alone.
"""

import ast
import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

from datasets import load_dataset
from tasks.command import main
from tasks.data import read_json_rows
from tasks.task import Problem, Task, task_option


@dataclass
class CodeSearchNet(Task):
    """Functions without a metric."""

    name = "codesearchnet"
    title = "CodeSearchNet, Python"
    source = "code-search-net/code_search_net"

    max_code_chars: int = task_option(1500, "longest function, in characters")

    def load(self, split: str) -> list[Problem]:
        """Load the functions of `"train"` or `"test"` that Python 3 can read."""
        problems = []
        for docstring, code in self._rows(split):
            body = without_docstring(code) if len(code) <= self.max_code_chars else None
            if body is not None and docstring.strip():
                comment = "\n".join(f"# {line}".rstrip() for line in docstring.strip().splitlines())
                problems.append(Problem(f"{comment}\n", body))
        return problems

    def _rows(self, split: str) -> list[tuple[str, str]]:
        if self.data is None:
            rows = load_dataset(str(self.source), "python", split=split)
            return list(zip(rows["func_documentation_string"], rows["func_code_string"]))
        rows = read_json_rows(Path(self.data) / f"{split}.jsonl", ("docstring", "code"))
        return [(row["docstring"], row["code"]) for row in rows]


def without_docstring(code: str) -> str | None:
    """A function without its documentation; `None` if it is not one function, or empty without it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in other people's texts
            (function,) = ast.parse(code).body
    except (SyntaxError, ValueError):
        return None
    if not isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return None
    first = function.body[0]
    if ast.get_docstring(function, clean=False) is None:
        return code.strip()
    if len(function.body) == 1 or first.lineno == function.lineno or first.end_lineno == function.body[1].lineno:
        return None
    lines = re.split(r"\r\n|\r|\n", code)  # as the parser counts them; a form feed ends no line
    return "\n".join(lines[: first.lineno - 1] + lines[first.end_lineno :]).strip()


if __name__ == "__main__":
    sys.exit(main(CodeSearchNet, Path(__file__).parent / "configs" / "codesearchnet-gpu.yaml"))
