"""Requests that ended because their server was killed, as the ledger has them."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from flexgate.server.ledger.entries import INTERRUPTED
from flexgate.server.ledger.reading import opened
from flexgate.server.ledger.terms import Terms, Version

_SOUGHT = (
    "SELECT sequence, tenant, key_id, endpoint, ended_at, prompt_tokens + completion_tokens FROM usage "
    "WHERE sequence > ? AND sequence <= ? AND outcome = ? ORDER BY sequence"
)
_PARTS = (
    "SELECT agreement, agreement_version, duties_sha256, prompt_positions + completion_positions, share_ppm "
    "FROM parts WHERE sequence = ? ORDER BY expert"
)


class Took(NamedTuple):
    """What an expert did; positions count in how many it took part."""

    agreement: str | None
    agreement_version: int | None
    duties_sha256: str | None
    positions: int
    share_ppm: int

    @property
    def version(self) -> Version:
        """The version of the agreement that it counts under."""
        return self.agreement or "", self.agreement_version or 0

    @property
    def terms(self) -> Terms | None:
        """What it counts under; None for what needs no agreement."""
        known = self.agreement is not None and self.agreement_version is not None
        return Terms(self.version, self.duties_sha256) if known else None


class Interruption(NamedTuple):
    """A request; it ended with its last mark, in microseconds."""

    tenant: str
    key_id: str
    endpoint: str
    ended_at: int
    tokens: int
    took: Sequence[Took]


def interruptions(path: Path, after: int, until: int) -> list[Interruption]:
    """Those of some sequences of a ledger, in their order. Blocks; raises `LedgerError`."""
    with opened(path) as ledger:
        rows = ledger.execute(_SOUGHT, (after, until, INTERRUPTED)).fetchall()
        return [Interruption._make((*values, _took(ledger, sequence))) for sequence, *values in rows]


def _took(ledger: sqlite3.Connection, sequence: int) -> list[Took]:
    return [Took(*row) for row in ledger.execute(_PARTS, (sequence,))]
