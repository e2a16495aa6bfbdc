"""A policy database's file and the commands that read it, as the tests of bad input use them."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

from typer.testing import CliRunner, Result

from flexgate.server.cli.main import app

LIVE = dict.fromkeys(("public", "news", "math", "secret"), 1)  # epochs


def run(*arguments: str) -> Result:
    """A `flexgate` command."""
    return CliRunner().invoke(app, list(arguments))


def refusal(found: Result) -> str:
    """The one sentence of a command that failed."""
    assert found.exit_code == 1, found.output
    (sentence,) = found.stderr.splitlines()
    return str(sentence)


def settle(path: Path) -> None:
    """Everything in the one file."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.execute("PRAGMA journal_mode = DELETE")


def content_of(path: Path) -> str:
    """Every row of every table."""
    settle(path)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return "\n".join(connection.iterdump())
