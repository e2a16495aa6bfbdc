"""Retired words do not come back: names, sentences, file names and documents use the glossary's."""

import ast
import re
import subprocess
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
WORDS: list[dict[str, Any]] = tomllib.loads(Path(__file__).with_name("words.toml").read_text())["word"]
RETIRED = {retired: word for word in WORDS for retired in word["retired"]}
CODE = ("policies", "kernels", "experts", "server", "benchmarks")
HISTORY = ("docs/decisions/", "docs/results/", "policies/store/migrations/versions/", "experts/demo/")
PATTERNS = {word: re.compile(rf"(?:(?<![a-z]){word}|{word.title()}|{word.upper()})(?![a-z])") for word in RETIRED}
PART = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
NAMES = ("id", "attr", "name", "arg", "asname")


@cache
def files() -> tuple[str, ...]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    found = listed.decode().split("\0")
    return tuple(path for path in found if (ROOT / path).is_file() and not path.startswith(HISTORY))


def has_any(text: str) -> bool:
    """Whether a text is worth parsing."""
    lower = text.lower()
    return any(word in lower and pattern.search(text) for word, pattern in PATTERNS.items())


def written(source: str) -> Iterator[str]:
    """The names in a module, and its strings but for docstrings."""
    tree = ast.parse(source)
    docs = {
        node.value for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docs:
            yield node.value
        for name in NAMES:
            if isinstance(value := getattr(node, name, None), str):
                yield value


@cache
def found() -> frozenset[tuple[str, str]]:
    """Every retired word, and the file that has it."""
    uses = set()
    for path in files():
        text = path
        if (path.endswith(".py") and path.startswith(CODE)) or (path.endswith(".md") and path != "CHANGELOG.md"):
            source = (ROOT / path).read_text()
            if has_any(source):
                text += "\n" + ("\n".join(written(source)) if path.endswith(".py") else source)
        uses |= {(part.lower(), path) for part in PART.findall(text) if part.lower() in RETIRED}
    return frozenset(uses)


def test_no_retired_word_is_used() -> None:
    wrong = [
        f"{path}: '{retired}'; say {RETIRED[retired]['instead']}"
        for retired, path in sorted(found())
        if not path.startswith(tuple(RETIRED[retired].get("allowed", ())))
    ]
    assert wrong == []


@pytest.mark.parametrize("word", WORDS, ids=lambda word: word["retired"][0])
def test_a_file_with_an_exception_needs_it(word: dict[str, Any]) -> None:
    used = {path for retired, path in found() if retired in word["retired"]}
    unneeded = [path for path in word.get("allowed", ()) if not path.endswith("/") and path not in used]
    assert unneeded == []


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("class SlotLeaseGranted: ...", "granted"),
        ("say('expert %s was Withdrawn', expert)", "withdrawn"),
        ("def f(residence_log): ...", "residence"),
        ("from a import b as peers", "peers"),
    ],
)
def test_a_retired_word_is_found_in_names_and_sentences(source: str, parts: str) -> None:
    assert has_any(source)
    assert parts in {part.lower() for text in written(source) for part in PART.findall(text)}


def test_docstrings_are_prose_and_not_searched() -> None:
    assert "nobody" not in " ".join(written('"""Nobody."""\ndef f():\n    """nobody"""\n'))
