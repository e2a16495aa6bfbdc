"""Every ``flexgate experts`` command that the documentation shows is one that the program takes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from flexgate.experts.cli import app

ROOT = Path(__file__).parents[2]
SHOWN = [
    words
    for name in ("docs/experts.md", "README.md")
    for words in re.findall(r"^\$ (?:torchrun .* )?\S*flexgate experts (.+)$", (ROOT / name).read_text(), re.MULTILINE)
]


def test_the_documentation_shows_the_whole_way() -> None:
    assert {"train-anchor", "keygen", "train", "verify", "merge", "extract", "inspect"} <= {w.split()[0] for w in SHOWN}


@pytest.mark.parametrize("words", SHOWN)
def test_a_command_that_is_shown_can_be_typed(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXGATE_KEY", "sk-demo-admin")  # as the README does first
    group = typer.main.get_command(app)
    name, *arguments = shlex.split(words, comments=True)
    command = group.get_command(typer.Context(group), name)  # type: ignore[attr-defined]
    assert command is not None, name
    command.make_context(name, arguments)
