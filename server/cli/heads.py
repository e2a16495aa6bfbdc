"""Heads that were kept in a file, for `flexgate audit verify` and `flexgate receipts verify`."""

from __future__ import annotations

from pathlib import Path

import typer

from flexgate.server.ledger.receipts.heads import whole_lines


def lines_of(path: Path) -> list[str]:
    """The file's lines; says on standard error how many are left out, since they were written in part."""
    lines, torn = whole_lines(path)
    if torn:
        said = "1 line is broken off and was" if torn == 1 else f"{torn} lines are broken off and were"
        typer.secho(f"flexgate: {path}: {said} left out", err=True, fg=typer.colors.YELLOW)
    return lines
