"""The path of a request as data: functions in the order of entry, files, moves between them, lines.

A move is what a reader does who follows the request: each function is read once, where it is entered first, and one
that stands in another file than the one read before costs a move. A call of a function that was read before costs none;
`jumps` counts those, too.
"""

import ast
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any

import flexgate.server

ROOT = Path(flexgate.server.__file__).resolve().parents[1]
"""The checkout whose server is measured."""
MOST_FILES = 30
MOST_MOVES = 35
MOST_LINES = 3500
CORE = ("server/engine/core/guard.py", "server/engine/guard.py")


@dataclass(frozen=True)
class Part:
    """What one process did for the request: the functions that it entered, in order, each as its file and name."""

    entered: tuple[tuple[str, str], ...]

    @property
    def read(self) -> tuple[tuple[str, str], ...]:
        """Each function once, where it is entered first."""
        return tuple(dict.fromkeys(self.entered))

    @property
    def files(self) -> tuple[str, ...]:
        """Each once, in the order of first entry."""
        return tuple(dict.fromkeys(file for file, _ in self.entered))

    @property
    def moves(self) -> int:
        """How often the function read next stands in another file than the one before."""
        return _changes(self.read)

    @property
    def jumps(self) -> int:
        """How often the function entered next stands in another file than the one before."""
        return _changes(self.entered)

    def to_json(self) -> dict[str, Any]:
        """The figures, and each file's functions in the order of reading."""
        reading = [[file, *(name for _, name in part)] for file, part in groupby(self.read, itemgetter(0))]
        figures = {"files": list(self.files), "moves": self.moves, "jumps": self.jumps, "lines": lines(self.files)}
        return {**figures, "lines_read": lines_read(self.read), "reading": reading}


@dataclass(frozen=True)
class Route:
    """One request: the API process's part, and the engine core's with its rank."""

    http: Part
    engine: Part

    @property
    def files(self) -> tuple[str, ...]:
        """All of them, each once."""
        return tuple(dict.fromkeys((*self.http.files, *self.engine.files)))

    def figures(self) -> dict[str, int]:
        """What the limits are about; `lines` are those of all files, comments included."""
        return {"files": len(self.files), "moves": self.http.moves, "lines": lines(self.files)}

    def over(self) -> list[str]:
        """A sentence for each limit that the path is beyond."""
        limits = {"files": MOST_FILES, "moves": MOST_MOVES, "lines": MOST_LINES}
        found = self.figures()
        return [f"{name}: {found[name]}, at most {most}" for name, most in limits.items() if found[name] > most]

    def to_json(self) -> dict[str, Any]:
        """For docs/results."""
        read = lines_read((*self.http.entered, *self.engine.entered))
        return {**self.figures(), "lines_read": read, "http": self.http.to_json(), "engine": self.engine.to_json()}


def lines(files: Iterable[str]) -> int:
    """How many lines the files have in all."""
    return sum(len((ROOT / file).read_text().splitlines()) for file in files)


def lines_read(functions: Iterable[tuple[str, str]]) -> int:
    """How many lines the functions have, each with its docstring and what is defined inside of it."""
    names: dict[str, set[str]] = {}
    for file, name in functions:
        names.setdefault(file, set()).add(name)
    return sum(_lines_of(ast.parse((ROOT / file).read_text()), wanted) for file, wanted in names.items())


def _lines_of(node: ast.AST, wanted: set[str], prefix: str = "") -> int:
    total = 0
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name, is_class = prefix + child.name, isinstance(child, ast.ClassDef)
            if name in wanted:
                total += (child.end_lineno or child.lineno) - child.lineno + 1
            else:
                total += _lines_of(child, wanted, f"{name}." if is_class else f"{name}.<locals>.")
        else:
            total += _lines_of(child, wanted, prefix)
    return total


def read(folder: Path) -> Route:
    """The last request of each process's trace; raises `ValueError` if one of the two is missing."""
    traces = [[json.loads(line) for line in path.read_text().splitlines()] for path in sorted(folder.glob("*.jsonl"))]
    return Route(_last(traces, False), _last(traces, True))


def _last(traces: Sequence[Sequence[Sequence[tuple[str, str]]]], in_core: bool) -> Part:
    found = [trace[-1] for trace in traces if trace and any(file in CORE for file, _ in trace[-1]) == in_core]
    if len(found) != 1:
        raise ValueError(f"{len(found)} processes traced the {'engine' if in_core else 'HTTP'} side, not one")
    return Part(tuple((file, name) for file, name in found[0]))


def _changes(functions: Sequence[tuple[str, str]]) -> int:
    return sum(one != other for (one, _), (other, _) in pairwise(functions))


def table(result: dict[str, Any]) -> str:
    """The figures as Markdown."""
    parts = [("API process", result["http"]), ("engine core and rank", result["engine"])]
    rows = [
        f"| {name} | {len(part['files'])} | {part['moves']} | {part['jumps']} | {part['lines']:,} "
        f"| {part['lines_read']:,} |"
        for name, part in parts
    ]
    rows += [_whole("whole path", result)]
    if "before" in result:
        rows += [_whole(f"whole path at {result['before']['commit'][:8]}", result["before"])]
    rows += [f"| limit | {MOST_FILES} | {MOST_MOVES} in the API process | | {MOST_LINES:,} | |"]
    return "\n".join(
        ["| | Files | Moves | Jumps | Lines | of functions read |", "|---|---|---|---|---|---|", *rows, ""]
    )


def _whole(name: str, result: dict[str, Any]) -> str:
    http = result["http"]
    moves = f"{http['moves']} in the API process | {http['jumps']} in the API process"
    return f"| {name} | {result['files']} | {moves} | {result['lines']:,} | {result['lines_read']:,} |"
