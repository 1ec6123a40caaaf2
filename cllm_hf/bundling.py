"""
One file out of several modules of a package, for machines where the package is not installed.

Starting from an entry module, only what it needs is taken: top-level statements, word for word, with the comments
above them. All of them share one namespace. Names that would get in each other's way are an error, never a guess.
"""

from __future__ import annotations

import ast
import builtins
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath


WIDTH = 119
# What everyone has who can run the file: numpy and safetensors come with transformers.
_AVAILABLE = {*sys.stdlib_module_names, "numpy", "safetensors", "torch", "transformers"}


@dataclass(frozen=True)
class _Import:
    """What a name stands for: `name` of `module`, or the module itself. The module is a path inside the package."""

    module: str
    name: str | None


@dataclass(eq=False)
class _Statement:
    """
    A top-level statement, and what it has to do with names.

    `uses` are all names it mentions, `attributes` the attributes it takes of each, and `variables` those that are also
    variables of a function in it. `internal` holds the relative imports inside its functions.
    """

    text: str
    defines: set[str]
    uses: set[str]
    attributes: dict[str, set[str]]
    variables: set[str]
    internal: dict[str, _Import]
    outside: set[str]


@dataclass
class _Module:
    docstring: str
    statements: list[_Statement] = field(default_factory=list)
    internal: dict[str, _Import] = field(default_factory=dict)  # imports from the package, by local name
    external: dict[str, str] = field(default_factory=dict)  # other imports, as lines, by local name

    def definitions_of(self, name: str) -> list[_Statement]:
        return [statement for statement in self.statements if name in statement.defines]


def bundle(sources: Mapping[str, str], entry: str) -> str:
    """
    Put a module and everything that it needs from its package into one file.

    Args:
        sources (`Mapping[str, str]`): source texts by their path in the package, such as `"decoding/loop.py"`.
        entry (`str`): path of the module whose names the file is made for.

    Returns:
        `str`: source text that imports only from the standard library, numpy, safetensors, torch and transformers.

    Raises:
        RuntimeError: if a name means two things, a needed name is defined nowhere, or the package does something that
            cannot be moved into one file, such as work at import time.
    """
    bundled = _Bundle(sources)
    bundled.take_module(entry)
    return bundled.render(entry)


class _Bundle:
    def __init__(self, sources: Mapping[str, str]):
        self.sources = sources
        self.modules: dict[str, _Module] = {}
        self.taken: dict[str, list[_Statement]] = {}
        self.meanings: dict[str, str] = {}  # what each name of the file stands for
        self.imports: set[str] = set()
        self.aliases: dict[str, dict[str, str]] = {}  # by module: local name to the name in the file
        self.namespaces: dict[str, tuple[str, set[str]]] = {}  # modules imported whole: path and attributes

    def take_module(self, path: str) -> None:
        for statement in self._module(path).statements:
            self._take(path, statement)

    def render(self, entry: str) -> str:
        ordered: list[str] = []
        for path in self.modules:
            if path != entry:
                self._visit(path, ordered, set())
        sections = [self._section(path) for path in [*(path for path in ordered if path != entry), entry]]
        lines = ["from __future__ import annotations", "", *_import_lines(self.imports)]
        return "\n".join(lines) + "\n" + "".join(sections)

    def _visit(self, path: str, ordered: list[str], visiting: set[str]) -> None:
        """Modules that another one imports at its top come before it."""
        if path in visiting or path in ordered or not self.taken.get(path):
            return
        for origin in self.modules[path].internal.values():
            self._visit(origin.module, ordered, visiting | {path})
        ordered.append(path)

    def _section(self, path: str) -> str:
        module = self.modules[path]
        rule = "# " + "-" * (WIDTH - 2)
        head = [rule, f"# {path}", *(f"# {line}".rstrip() for line in module.docstring.splitlines()), rule]
        parts = [f"{local} = {name}" for local, name in sorted(self.aliases.get(path, {}).items())]
        parts += [statement.text for statement in module.statements if statement in self.taken[path]]
        for local, (target, attributes) in sorted(self.namespaces.items()):
            if target == path:
                arguments = "".join(f"    {name}={name},\n" for name in sorted(attributes))
                parts.append(f"{local} = SimpleNamespace(\n{arguments})")
        text = "\n".join(head) + "\n"
        for before, part in zip(["", *parts], parts):
            is_block = "\n" in before or "\n" in part
            text += ("\n\n" if is_block else "" if before else "\n") + part + "\n"
        return "\n\n" + text

    def _module(self, path: str) -> _Module:
        if path not in self.modules:
            self.modules[path] = _read_module(path, self.sources)
            self.taken[path] = []
        return self.modules[path]

    def _take(self, path: str, statement: _Statement) -> None:
        """Take a statement and everything that it uses."""
        if statement in self.taken[path]:
            return
        self.taken[path].append(statement)
        module = self.modules[path]
        if statement.outside - _AVAILABLE:
            self._check_available(path, statement.outside)
        for name in statement.defines:
            self._mean(name, f"{path}:{name}")
        scope = {**module.internal, **statement.internal}
        for name in sorted(statement.uses):
            for definition in module.definitions_of(name):
                self._take(path, definition)
            if name in scope:
                self._take_import(path, statement, name, scope[name])
            elif name in module.external:
                line = module.external[name]
                self._check_available(path, {line.split()[1].split(".")[0]})
                self._mean(name, line if line.startswith("from") or " as " in line else f"import {name}")
                self.imports.add(line)

    def _take_import(self, path: str, statement: _Statement, local: str, origin: _Import) -> None:
        if origin.name is not None:
            name = self._take_name(path, origin.module, origin.name)
            if local != name:
                self._mean(local, f"{path}:{local}")
                self.aliases.setdefault(path, {})[local] = name
            return
        defined = {name for other in self._module(origin.module).statements for name in other.defines}
        attributes = statement.attributes.get(local, set())
        if local not in statement.variables and (not attributes or attributes - defined):
            taken = ", ".join(sorted(attributes - defined)) or "the whole"
            raise RuntimeError(
                f"{path} takes {taken} of the module `{local}`, which one file cannot do. Use names that "
                f"{origin.module} defines."
            )
        names = {self._take_name(path, origin.module, name) for name in sorted(attributes & defined)}
        self._mean(local, f"the module {origin.module}")
        self.imports.add("from types import SimpleNamespace")
        self.namespaces.setdefault(local, (origin.module, set()))[1].update(names)

    def _take_name(self, path: str, target: str, name: str) -> str:
        """Take what a module calls `name`, and return how the module that defines it calls it."""
        module = self._module(target)
        definitions = module.definitions_of(name)
        onward = module.internal.get(name)
        if not definitions and onward is not None and onward.name is not None:
            return self._take_name(target, onward.module, onward.name)
        if not definitions:
            raise RuntimeError(f"{path} imports `{name}` from {target}, which does not define it.")
        for definition in definitions:
            self._take(target, definition)
        return name

    def _mean(self, name: str, meaning: str) -> None:
        if hasattr(builtins, name):
            raise RuntimeError(f"`{name}` ({meaning}) would hide Python's own in one file. Rename it.")
        other = self.meanings.setdefault(name, meaning)
        if other != meaning:
            raise RuntimeError(
                f"`{name}` means two things that one file cannot hold both: {other} and {meaning}. Rename one of them."
            )

    @staticmethod
    def _check_available(path: str, packages: set[str]) -> None:
        missing = sorted(packages - _AVAILABLE)
        if missing:
            raise RuntimeError(f"{path} imports {', '.join(missing)}, which those who get the file may not have.")


def _read_module(path: str, sources: Mapping[str, str]) -> _Module:
    tree = ast.parse(sources[path])
    lines = sources[path].splitlines()
    module = _Module(ast.get_docstring(tree) or "")
    for node in tree.body:
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_for_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if isinstance(node, ast.Import | ast.ImportFrom):
            _read_import(node, path, sources, module.internal, module.external)
        elif not is_text and not is_for_types:
            module.statements.append(_read_statement(node, path, sources, lines))
    return module


def _read_import(
    node: ast.Import | ast.ImportFrom,
    path: str,
    sources: Mapping[str, str],
    internal: dict[str, _Import],
    external: dict[str, str],
) -> None:
    for alias in node.names:
        written = alias.name if alias.asname is None else f"{alias.name} as {alias.asname}"
        local = alias.asname or alias.name
        if isinstance(node, ast.Import):
            external[local.split(".")[0]] = f"import {written}"
        elif node.level > 0:
            internal[local] = _resolve(node, alias.name, path, sources)
        elif node.module != "__future__":
            external[local] = f"from {node.module} import {written}"


def _resolve(node: ast.ImportFrom, name: str, path: str, sources: Mapping[str, str]) -> _Import:
    parents = PurePosixPath(path).parts[:-1]
    if node.level - 1 > len(parents):
        raise RuntimeError(f"{path}, line {node.lineno}, imports from outside the package, which is not part of it.")
    start = parents[: len(parents) - (node.level - 1)]
    package = PurePosixPath(*start, *(node.module.split(".") if node.module else ()))
    for module in (f"{package / name}.py", f"{package / name / '__init__.py'}"):
        if module in sources:
            return _Import(module, None)
    for module in (f"{package}.py", f"{package / '__init__.py'}"):
        if module in sources:
            return _Import(module, name)
    raise RuntimeError(f"{path}, line {node.lineno}, imports from {package}, which is not part of the package.")


def _read_statement(node: ast.stmt, path: str, sources: Mapping[str, str], lines: list[str]) -> _Statement:
    nodes = list(ast.walk(node))
    defines = _defined_names(node)
    if not defines:
        raise RuntimeError(
            f"{path}, line {node.lineno}, does something when it is imported, which one file leaves out."
        )
    internal: dict[str, _Import] = {}
    edits: dict[int, str | None] = {}
    for block in _blocks(nodes):
        relative = [child for child in block if isinstance(child, ast.ImportFrom) and child.level > 0]
        for child in relative:
            _read_import(child, path, sources, internal, {})
            edits.update(dict.fromkeys(range(child.lineno, (child.end_lineno or child.lineno) + 1)))
        if relative and len(relative) == len(block):
            edits[relative[0].lineno] = " " * relative[0].col_offset + "pass"
    attributes: dict[str, set[str]] = {}
    uses: set[str] = set()
    variables: set[str] = set()
    outside: set[str] = set()
    for part in nodes:
        if isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name):
            attributes.setdefault(part.value.id, set()).add(part.attr)
        elif isinstance(part, ast.Name):
            uses.add(part.id)
            if not isinstance(part.ctx, ast.Load):
                variables.add(part.id)
        elif isinstance(part, ast.arg):
            variables.add(part.arg)
        elif isinstance(part, ast.Import):
            outside.update(alias.name.split(".")[0] for alias in part.names)
        elif isinstance(part, ast.ImportFrom) and part.level == 0:
            outside.add(str(part.module).split(".")[0])
    text = "\n".join(_text_lines(node, lines, edits))
    return _Statement(text, defines, uses, attributes, variables, internal, outside)


def _text_lines(node: ast.stmt, lines: list[str], edits: Mapping[int, str | None]) -> Iterator[str]:
    """The lines of a statement with the comments right above it, edited; `None` leaves a line out."""
    first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
    while first > 1 and lines[first - 2].startswith("#"):
        first -= 1
    left_out = False
    for number in range(first, (node.end_lineno or node.lineno) + 1):
        line = edits.get(number, lines[number - 1])
        if line is not None and not (left_out and not line):  # nor the empty line after what is left out
            yield line
        left_out = line is None


def _blocks(nodes: list[ast.AST]) -> Iterator[list[ast.stmt]]:
    for node in nodes:
        for name in ("body", "orelse", "finalbody"):
            block = getattr(node, name, None)
            if isinstance(block, list):
                yield block


def _defined_names(node: ast.AST) -> set[str]:
    """Names that a top-level statement binds in its module."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Lambda | ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
        return set()
    names: set[str] = set()
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        names.add(node.id)
    elif isinstance(node, ast.Import | ast.ImportFrom):
        names.update((alias.asname or alias.name).split(".")[0] for alias in node.names)
    for child in ast.iter_child_nodes(node):
        names |= _defined_names(child)
    return names


def _import_lines(imports: set[str]) -> Iterator[str]:
    yield from sorted(line for line in imports if not line.startswith("from"))
    names: dict[str, list[str]] = {}
    for line in sorted(imports):
        if line.startswith("from"):
            module, name = line.removeprefix("from ").split(" import ")
            names.setdefault(module, []).append(name)
    for module in sorted(names):
        line = f"from {module} import {', '.join(names[module])}"
        if len(line) > WIDTH:
            line = f"from {module} import (\n" + "".join(f"    {name},\n" for name in names[module]) + ")"
        yield line
