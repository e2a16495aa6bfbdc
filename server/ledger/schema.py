"""The tables of the ledger, and how a file of an older version becomes one of the newest.

A new file takes every step, an older one those that it has not taken, all in one transaction.
"""

from __future__ import annotations

import sqlite3
import time
import uuid
from collections.abc import Callable
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Final

from flexgate.server.ledger.entries import MICROSECONDS
from flexgate.server.ledger.errors import LedgerError
from flexgate.server.ledger.shares import share_ppm

APPLICATION: Final = 0x464C4758  # "FLGX", in the file's header
REQUESTS_AT_ONCE: Final = 10_000
FIRST: Final = (
    """CREATE TABLE running (
    request TEXT PRIMARY KEY,
    registration TEXT NOT NULL,
    mark BLOB
) WITHOUT ROWID""",
    """CREATE TABLE usage (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT,
    request TEXT NOT NULL UNIQUE,
    registered_at INTEGER NOT NULL,
    ended_at INTEGER NOT NULL,
    outcome TEXT NOT NULL,
    tenant TEXT NOT NULL,
    key_id TEXT NOT NULL,
    endpoint TEXT NOT NULL,
    model TEXT NOT NULL,
    policy_version INTEGER NOT NULL,
    weights_epoch INTEGER NOT NULL,
    prompt_tokens INTEGER NOT NULL,
    cached_tokens INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL
)""",
    "CREATE INDEX usage_ended_at ON usage (ended_at)",
    """CREATE TABLE parts (
    sequence INTEGER NOT NULL REFERENCES usage,
    expert TEXT NOT NULL,
    owner TEXT,
    prompt_mass INTEGER NOT NULL,
    prompt_positions INTEGER NOT NULL,
    completion_mass INTEGER NOT NULL,
    completion_positions INTEGER NOT NULL,
    PRIMARY KEY (sequence, expert)
) WITHOUT ROWID""",
)


def _first(connection: sqlite3.Connection) -> None:
    for statement in FIRST:
        connection.execute(statement)


def _agreements_and_shares(connection: sqlite3.Connection) -> None:
    """The agreement that each use counts under, unknown of earlier ones, and each expert's share."""
    for column in ("agreement TEXT", "agreement_version INTEGER", "share_ppm INTEGER NOT NULL DEFAULT 0"):
        connection.execute(f"ALTER TABLE parts ADD COLUMN {column}")
    (last,) = connection.execute("SELECT coalesce(max(sequence), 0) FROM usage").fetchone()
    for first in range(0, last, REQUESTS_AT_ONCE):
        rows = connection.execute(
            "SELECT sequence, expert, prompt_mass + completion_mass FROM parts "
            "WHERE sequence > ? AND sequence <= ? ORDER BY sequence, expert",
            (first, first + REQUESTS_AT_ONCE),
        ).fetchall()
        for _, group in groupby(rows, key=itemgetter(0)):
            parts = list(group)
            shares = share_ppm([mass for _, _, mass in parts])
            connection.executemany(
                "UPDATE parts SET share_ppm = ? WHERE sequence = ? AND expert = ?",
                [(share, sequence, expert) for share, (sequence, expert, _) in zip(shares, parts, strict=True)],
            )


def _digests(connection: sqlite3.Connection) -> None:
    """Digests of bodies and of experts' packages, for receipts; unknown of earlier requests."""
    for table, column in (("usage", "prompt_sha256"), ("usage", "answer_sha256"), ("parts", "package")):
        connection.execute(f"ALTER TABLE {table} ADD COLUMN {column} TEXT")


def _duties(connection: sqlite3.Connection) -> None:
    """A digest of the duties that each use counts under, unknown of earlier ones."""
    connection.execute("ALTER TABLE parts ADD COLUMN duties_sha256 TEXT")


def _identity(connection: sqlite3.Connection) -> None:
    """An id of the ledger, for copies of it, and since when (in microseconds) no usage is missing that was deleted."""
    connection.execute("CREATE TABLE ledger (id TEXT NOT NULL, whole_since INTEGER NOT NULL)")
    connection.execute("INSERT INTO ledger VALUES (?, 0)", (uuid.uuid4().hex,))


def _running(connection: sqlite3.Connection) -> None:
    """Running requests by number, their marks apart: neither is written again with the other, nor spills over pages."""
    for statement in (
        "ALTER TABLE running RENAME TO former",
        "CREATE TABLE running (number INTEGER PRIMARY KEY, request TEXT NOT NULL, registration TEXT NOT NULL)",
        "CREATE TABLE marks (number INTEGER PRIMARY KEY, mark BLOB NOT NULL)",
        "INSERT INTO running (request, registration) SELECT request, registration FROM former ORDER BY request",
        "INSERT INTO marks SELECT number, mark FROM running JOIN former USING (request) WHERE mark IS NOT NULL",
        "DROP TABLE former",
    ):
        connection.execute(statement)


def _corrections(connection: sqlite3.Connection) -> None:
    """Corrections and disputes, which are only added; a dispute is decided once."""
    connection.execute(
        """CREATE TABLE corrections (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL,
    kind TEXT NOT NULL,
    owner TEXT NOT NULL,
    request TEXT NOT NULL,
    at INTEGER NOT NULL,
    actor TEXT NOT NULL,
    reason TEXT NOT NULL,
    amount TEXT,
    currency TEXT,
    dispute TEXT,
    UNIQUE (owner, kind, id),
    UNIQUE (owner, dispute)
)"""
    )
    connection.execute("CREATE INDEX corrections_owner ON corrections (owner, at)")


def _numbers(connection: sqlite3.Connection) -> None:
    """What experts were registered as once, and of each part numbers alone; `parts` shows them as before."""
    names = "expert", "owner", "agreement", "agreement_version", "package", "duties_sha256"
    counts = "prompt_mass, prompt_positions, completion_mass, completion_positions, share_ppm"
    same = " AND ".join(f"experts.{name} IS parts.{name}" for name in names)
    for statement in (
        """CREATE TABLE experts (
    number INTEGER PRIMARY KEY,
    expert TEXT NOT NULL,
    owner TEXT,
    agreement TEXT,
    agreement_version INTEGER,
    package TEXT,
    duties_sha256 TEXT
)""",
        "CREATE INDEX experts_agreement ON experts (expert, agreement, agreement_version)",
        """CREATE TABLE counts (
    sequence INTEGER NOT NULL REFERENCES usage,
    number INTEGER NOT NULL REFERENCES experts,
    prompt_mass INTEGER NOT NULL,
    prompt_positions INTEGER NOT NULL,
    completion_mass INTEGER NOT NULL,
    completion_positions INTEGER NOT NULL,
    share_ppm INTEGER NOT NULL,
    PRIMARY KEY (sequence, number)
) WITHOUT ROWID""",
        f"INSERT INTO experts ({', '.join(names)}) SELECT DISTINCT {', '.join(names)} FROM parts",
        f"INSERT INTO counts (sequence, number, {counts}) SELECT sequence, number, {counts} FROM parts "
        f"CROSS JOIN experts ON {same} ORDER BY sequence, number",
        "DROP TABLE parts",
        f"CREATE VIEW parts AS SELECT sequence, {', '.join(names)}, {counts} "
        "FROM counts CROSS JOIN experts USING (number)",  # in this order: by sequence
    ):
        connection.execute(statement)


def _dated_marks(connection: sqlite3.Connection) -> None:
    """When a mark was written, in microseconds: a request that is interrupted ends then.

    Those that stand end now, as they did before: their months may have been closed over them.
    """
    connection.execute("ALTER TABLE marks ADD COLUMN at INTEGER NOT NULL DEFAULT 0")
    connection.execute("UPDATE marks SET at = ?", (round(time.time() * MICROSECONDS),))


def _closings(connection: sqlite3.Connection) -> None:
    """Closed months, in their order; `until` is when a month ended, in microseconds."""
    connection.execute(
        "CREATE TABLE closings (owner TEXT NOT NULL, period TEXT NOT NULL, at INTEGER NOT NULL, actor TEXT NOT NULL, "
        "payouts TEXT NOT NULL, until INTEGER NOT NULL, PRIMARY KEY (owner, until)) WITHOUT ROWID"
    )


def _exclusions(connection: sqlite3.Connection) -> None:
    """What each request's gate left out, unknown of earlier ones; a catalogue is there once."""
    connection.execute("CREATE TABLE catalogues (number INTEGER PRIMARY KEY, experts TEXT NOT NULL UNIQUE)")
    for column in ("catalogue INTEGER", "excluded TEXT"):
        connection.execute(f"ALTER TABLE usage ADD COLUMN {column}")


STEPS: Final[tuple[Callable[[sqlite3.Connection], None], ...]] = (
    _first,
    _agreements_and_shares,
    _digests,
    _duties,
    _identity,
    _running,
    _corrections,
    _numbers,
    _dated_marks,
    _closings,
    _exclusions,
)
"""The step at index n makes version n + 1 out of version n."""
VERSION: Final = len(STEPS)


def bring_up_to_date(connection: sqlite3.Connection, path: Path) -> None:
    """Create the tables, or take the steps that are missing.

    Args:
        connection: in autocommit mode.

    Raises:
        LedgerError: the file is no ledger, or one of a newer version.
    """
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if application != APPLICATION:
        if connection.execute("SELECT count(*) FROM sqlite_master").fetchone() != (0,):
            raise LedgerError(f"{path} is not a ledger of flexgate: move it away, and start again")
        version = 0
    if version > VERSION:
        raise LedgerError(f"{path} is a ledger of version {version}, not {VERSION}: use the newer flexgate")
    if version == VERSION:
        return
    connection.execute("BEGIN IMMEDIATE")
    for step in STEPS[version:]:
        step(connection)
    connection.execute(f"PRAGMA application_id = {APPLICATION}")
    connection.execute(f"PRAGMA user_version = {VERSION}")
    connection.execute("COMMIT")
