"""Find the place of a planted defect by name and syntax, and change it there; `tests/defects/run.py` says the form.

Line numbers, comments, formatting and the file of a function do not matter: code is compared as syntax trees.
"""

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from textwrap import dedent, indent
from typing import Any, cast

FOLDERS = ("policies", "kernels", "experts", "server")  # the packages of `flexgate`
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


class AnchorError(Exception):
    """A defect cannot be planted: what was looked for, where, and what was found instead."""


class Planting:
    """Edits of the source under ``root``, kept in memory.

    Attributes:
        texts: the files that change, each with its new text.
        notes: what was found elsewhere than it was said to be.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self.texts: dict[Path, str] = {}
        self.notes: list[str] = []

    def replace(self, at: str, find: str, replace: str) -> None:
        """Replace the one place of some code.

        Args:
            at: ``package.module:Class.function``, ``package.module``, or a file's path for what is not Python.
            find: an expression, statements, keyword arguments or entries of a dict.
            replace: what comes in its stead; nothing to delete it.

        Raises:
            AnchorError: the code is not there, is there more than once, or would not change.
        """
        find, replace = dedent(find).strip(), dedent(replace).strip()
        try:
            path, text = (self._in_text if "/" in at else self._in_package)(at, find, replace)
        except AnchorError as error:
            raise AnchorError(f"{at}: {error}; looked for:\n{indent(find, '    ')}") from error
        self.texts[path] = text

    def _read(self, path: Path) -> str:
        return self.texts.get(path) or path.read_text()

    def _in_text(self, at: str, find: str, replace: str) -> tuple[Path, str]:
        path = self._root / at
        text = self._read(path) if path.is_file() else ""
        wanted = re.compile(r"\s+".join(map(re.escape, find.split())))
        if (count := len(wanted.findall(text))) != 1:
            raise AnchorError(f"found {count} times, not once")
        changed = wanted.sub(lambda _: replace, text)
        if changed.split() == text.split():
            raise AnchorError("nothing changes")
        return path, changed

    def _in_package(self, at: str, find: str, replace: str) -> tuple[Path, str]:
        module, _, name = at.partition(":")
        paths = {dotted(self._root, path): path for path in sources(self._root)}
        if module in paths and _scopes(ast.parse(self._read(paths[module])), name):
            return paths[module], replaced(self._read(paths[module]), name, find, replace)
        found = {}
        for other, path in paths.items():
            try:
                found[other] = path, replaced(self._read(path), name, find, replace)
            except AnchorError:
                continue
        if len(found) != 1:
            raise AnchorError(f"is not there, and {' and '.join(found) or 'no other module'} has it with this code")
        self.notes.append(f"{at}: has moved to {next(iter(found))}; correct 'at'")
        return next(iter(found.values()))


@lru_cache
def sources(root: Path) -> list[Path]:
    """Every module of the package."""
    return [path for folder in FOLDERS for path in sorted((root / folder).rglob("*.py"))]


def dotted(root: Path, path: Path) -> str:
    """The name by which a module is imported."""
    return ".".join(("flexgate", *path.relative_to(root).with_suffix("").parts)).removesuffix(".__init__")


def replaced(text: str, name: str, find: str, replace: str) -> str:
    """A module's text with the one place of some code replaced; raises `AnchorError`.

    Args:
        name: the qualified name of the function or class to look in; empty for the whole module.
    """
    tree = ast.parse(text)
    before = _dump(tree)
    scopes = _scopes(tree, name)
    if not scopes:
        raise AnchorError(f"there is no '{name}'")
    readings = _readings(find, replace)
    places = [place for scope in scopes for reading in readings for place in _places(scope, *reading)]
    if len(places) != 1:
        lines = f" (lines {', '.join(str(place.line) for place in places)}), write more of it" if places else ""
        raise AnchorError(f"found {len(places)} times as {' or '.join(kind for kind, _, _ in readings)}{lines}")
    places[0].fill()
    if _dump(tree) == before:
        raise AnchorError("nothing changes")
    return ast.unparse(ast.fix_missing_locations(tree)) + "\n"


def _scopes(tree: ast.Module, name: str) -> list[ast.AST]:
    """The definitions of a qualified name: several if it is overloaded, the module if the name is empty."""
    found: list[ast.AST] = [tree]
    for part in name.split(".") if name else ():
        found = [child for node in found for child in _defined_in(node) if child.name == part]
    return found


def _defined_in(node: ast.AST) -> Iterator[Definition]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Definition):
            yield child
        else:
            yield from _defined_in(child)


@dataclass(frozen=True)
class _Place:
    """Where some code stands in its parent, and what comes in its stead."""

    parent: ast.AST
    field: str
    start: int | None  # None: the field is the code itself, not a list
    stop: int
    pieces: list[Any]
    line: int

    def fill(self) -> None:
        if self.start is None:
            setattr(self.parent, self.field, self.pieces[0])
        elif isinstance(self.parent, ast.Dict) and self.field == "keys":
            self.parent.keys[self.start : self.stop] = [key for key, _ in self.pieces]
            self.parent.values[self.start : self.stop] = [value for _, value in self.pieces]
        else:
            block = getattr(self.parent, self.field)
            block[self.start : self.stop] = self.pieces
            if not block and self.field == "body":
                block.append(ast.Pass())


def _places(scope: ast.AST, kind: str, wanted: list[Any], pieces: list[Any]) -> Iterator[_Place]:
    dumps = [_dump(piece) for piece in wanted]
    for parent in ast.walk(scope):
        for field, value in ast.iter_fields(parent):
            if isinstance(value, ast.expr) and kind == "an expression" and [_dump(value)] == dumps:
                yield _Place(parent, field, None, 0, pieces, value.lineno)
            if not isinstance(value, list) or (field == "keys") != (kind == "entries"):
                continue
            items = _entries(parent) if kind == "entries" and isinstance(parent, ast.Dict) else value
            told = [_dump(item) for item in items]
            for start in range(len(told) - len(dumps) + 1):
                if told[start : (stop := start + len(dumps))] == dumps:
                    yield _Place(parent, field, start, stop, pieces, _line(items[start]))


def _readings(find: str, replace: str) -> list[tuple[str, list[Any], list[Any]]]:
    """Both texts as code of the same kind; an assignment may be a keyword argument as well."""
    found = []
    for kind, read in _KINDS.items():
        try:
            wanted, pieces = read(find), read(replace)
        except SyntaxError:
            continue
        if wanted and (pieces or kind != "an expression"):
            found.append((kind, wanted, pieces))
            if kind == "an expression":
                break
    if not found:
        raise AnchorError(f"'find' and 'replace' must be Python of one kind: {', '.join(_KINDS)}")
    return found


def _entries(node: ast.AST) -> list[tuple[ast.expr | None, ast.expr]]:
    if not isinstance(node, ast.Dict):
        raise SyntaxError("not the entries of a dict")
    return list(zip(node.keys, node.values, strict=True))


def _keywords(text: str) -> list[ast.keyword]:
    call = ast.parse(f"_({text}\n)", mode="eval").body
    if not isinstance(call, ast.Call) or call.args:
        raise SyntaxError("not keyword arguments alone")
    return call.keywords


_KINDS: dict[str, Callable[[str], list[Any]]] = {
    "an expression": lambda text: [ast.parse(f"({text}\n)", mode="eval").body] if text else [],
    "statements": lambda text: ast.parse(text).body,
    "keyword arguments": _keywords,
    "entries": lambda text: _entries(ast.parse(f"{{{text}\n}}", mode="eval").body),
}


def _dump(piece: Any) -> str:
    parts = piece if isinstance(piece, tuple) else (piece,)
    return " ".join(ast.dump(part) if isinstance(part, ast.AST) else repr(part) for part in parts)


def _line(piece: Any) -> int:
    return cast(int, (piece[1] if isinstance(piece, tuple) else piece).lineno)
