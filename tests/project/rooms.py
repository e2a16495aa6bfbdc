"""Count how many rooms a reader found: `python tests/project/rooms.py GUESSES`, a file with one path per line.

The lines answer the questions of rooms.toml in their order. `--questions` prints them. Exit status 1 below nine.
"""

import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LEAST = 9


def rooms() -> list[dict[str, Any]]:
    """Questions with their answers."""
    found: list[dict[str, Any]] = tomllib.loads(Path(__file__).with_name("rooms.toml").read_text())["room"]
    return found


def misses(guesses: Sequence[str]) -> list[str]:
    """A line for each wrong guess; raises `ValueError` unless there is one guess for each question."""
    asked = rooms()
    if len(guesses) != len(asked):
        raise ValueError(f"{len(guesses)} guesses for {len(asked)} questions: write one path per line")
    pairs = zip(asked, guesses, strict=True)
    return [f"{room['question']}\n    {guess}, not {room['path']}" for room, guess in pairs if guess != room["path"]]


def main(arguments: list[str]) -> int:
    """Print what was asked for; returns the exit status."""
    if arguments == ["--questions"]:
        sys.stdout.write("".join(f"{number}. {room['question']}\n" for number, room in enumerate(rooms(), 1)))
        return 0
    if len(arguments) != 1:
        sys.stderr.write(f"{__doc__}\n")
        return 2
    guesses = [line.strip().removeprefix("./") for line in Path(arguments[0]).read_text().splitlines() if line.strip()]
    wrong = misses(guesses)
    sys.stdout.write("".join(f"{line}\n" for line in [*wrong, f"{len(guesses) - len(wrong)} of {len(guesses)} found"]))
    return 0 if len(guesses) - len(wrong) >= LEAST else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
