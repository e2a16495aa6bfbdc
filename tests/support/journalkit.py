"""Requests of a journal, and what it keeps of them."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

from flexgate.server.ledger.entries import RegisteredExpert, Registration, Used


def registration(name: str) -> Registration:
    experts = (RegisteredExpert(0, "public", "commons"), RegisteredExpert(2, "news", "gazette", "a-news", 4))
    return Registration(f"dec_{name}", 5, "proj_a", "key_a", "chat", "tiny", 7, 3, experts)


def used(prompt: int, completion: int) -> Used:
    """Of three slots; every position used slot 0, and every completion slot 2 as well."""
    return Used(
        prompt, 1, completion, [prompt * 3, 0, 0, prompt, 0, 0], [completion, 0, completion, completion, 0, completion]
    )


def rows(path: Path, table: str = "usage") -> list[dict[str, Any]]:
    connection = sqlite3.connect(path)
    try:
        connection.row_factory = sqlite3.Row
        return [dict(row) for row in connection.execute(f"SELECT * FROM {table}")]
    finally:
        connection.close()
