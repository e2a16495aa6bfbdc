"""Heads of the audit log and of the receipts' chain, appended to a file outside from time to time.

Who keeps the file can show later that either was written anew or cut off: `flexgate audit verify --heads` and
`flexgate receipts verify --heads` compare it.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from flexgate.policies.errors import PolicyError
from flexgate.policies.store.store import Store
from flexgate.server.ledger.lines import append_lines
from flexgate.server.ledger.receipts.book import BookError, opened

LOG: Final = "receipts"
"""The `log` of a head of receipts."""

logger = logging.getLogger(__name__)


def whole_lines(path: Path) -> tuple[list[str], int]:
    """The lines of a file of heads, and how many more were written in part, and are no JSON."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    whole = [line for line in lines if not _is_torn(line)]
    return whole, len(lines) - len(whole)


def _is_torn(line: str) -> bool:
    try:
        json.loads(line)
    except json.JSONDecodeError:
        return line.startswith("{")
    return False


class Heads:
    """Appends what is new every so many seconds."""

    def __init__(self, store: Store, book: Path, file: Path, *, seconds: float) -> None:
        self._store = store
        self._book = book
        self._file = file
        self._seconds = seconds
        self._written: list[dict[str, Any]] = []
        self._failing = False

    async def run(self) -> None:
        """Append until it is cancelled: at once, and then every so often."""
        while True:
            await asyncio.to_thread(self.append)
            await asyncio.sleep(self._seconds)

    def append(self) -> None:
        """Append the heads that were not appended before. Blocks. What fails is logged, and tried again next time."""
        try:
            found = list(self._found())
            new = [head for head in found if head not in self._written]
            if new:
                append_lines(self._file, (json.dumps(head).encode() for head in new))
            self._written, self._failing = found, False
        except (OSError, PolicyError, BookError) as error:
            if not self._failing:
                logger.error("heads cannot be appended to %s, and are tried again: %s", self._file, error)
            self._failing = True

    def _found(self) -> Iterator[dict[str, Any]]:
        for head in self._store.audit_heads():
            if head.sequence:
                yield head._asdict()
        with opened(self._book) as book:
            end = book.end()
            if end.number:
                yield {"log": LOG, "server": book.server, "sequence": end.number, "hash": end.hash}
