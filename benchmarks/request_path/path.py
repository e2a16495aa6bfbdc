"""The path of a request as data: files in the order of first entry, moves between them, lines."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
MOST_FILES = 30
MOST_MOVES = 35
MOST_LINES = 3500
CORE = ("server/engine/core/guard.py",)


@dataclass(frozen=True)
class Part:
    """What one process did for the request: the files of the functions that it entered, in order."""

    entered: tuple[str, ...]

    @property
    def files(self) -> tuple[str, ...]:
        """Each once, in the order of first entry."""
        return tuple(dict.fromkeys(self.entered))

    @property
    def moves(self) -> int:
        """How often the function entered next stands in another file than the one before."""
        return sum(one != other for one, other in zip(self.entered, self.entered[1:], strict=False))


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
        parts = {"http": self.http, "engine": self.engine}
        return {
            **self.figures(),
            **{
                name: {"files": list(part.files), "moves": part.moves, "lines": lines(part.files)}
                for name, part in parts.items()
            },
        }


def lines(files: Iterable[str]) -> int:
    """How many lines the files have in all."""
    return sum(len((ROOT / file).read_text().splitlines()) for file in files)


def read(folder: Path) -> Route:
    """The last request of each process's trace; raises `ValueError` if one of the two is missing."""
    traces = [[json.loads(line) for line in path.read_text().splitlines()] for path in sorted(folder.glob("*.jsonl"))]
    return Route(_last(traces, False), _last(traces, True))


def _last(traces: Sequence[Sequence[Sequence[str]]], in_core: bool) -> Part:
    found = [trace[-1] for trace in traces if trace and any(file in CORE for file in trace[-1]) == in_core]
    if len(found) != 1:
        raise ValueError(f"{len(found)} processes traced the {'engine' if in_core else 'HTTP'} side, not one")
    return Part(tuple(found[0]))


def table(result: dict[str, Any]) -> str:
    """The figures as Markdown."""
    rows = [("API process", result["http"]), ("engine core and rank", result["engine"])]
    body = [f"| {name} | {len(part['files'])} | {part['moves']} | {part['lines']:,} |" for name, part in rows]
    limits = f"| limit | {MOST_FILES} | {MOST_MOVES} in the API process | {MOST_LINES:,} |"
    total = f"| whole path | {result['files']} | | {result['lines']:,} |"
    return "\n".join(["| | Files | Moves between files | Lines |", "|---|---|---|---|", *body, total, limits, ""])
