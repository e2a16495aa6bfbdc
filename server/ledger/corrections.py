"""Corrections of what is owed, and owners' disputes: rows that name a receipt, are added, and never changed.

    correction   an amount that an administrator adds to what an owner is owed, or takes off; may accept a dispute
    dispute      an owner says that a receipt is wrong
    rejection    an administrator decides that a dispute changes nothing

A correction belongs to the period in which it is made. A dispute is open until a row names it.
"""

from __future__ import annotations

import logging
import re
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Final, Literal, NamedTuple

from flexgate.policies.errors import InvalidName, StoreFull, StoreReplaced
from flexgate.policies.store.identity import FileIdentity
from flexgate.policies.store.reserve import Reserve
from flexgate.policies.vocabulary import parse_currency
from flexgate.server.ledger.entries import MICROSECONDS, microseconds
from flexgate.server.ledger.errors import LedgerError

Kind = Literal["correction", "dispute", "rejection"]
State = Literal["open", "accepted", "rejected"]
MOST_OPEN: Final = 1_000
BUSY_SECONDS: Final = 5.0
SETTLED_SECONDS: Final = 1.0
NOTICED_SECONDS: Final = 60
"""From where on it is logged that the clock is behind."""
_AMOUNT: Final = re.compile(r"-?(0|[1-9][0-9]{0,11})(\.[0-9]{1,9})?", re.ASCII)
_STATE: Final = (
    "CASE WHEN kind <> 'dispute' THEN NULL ELSE coalesce((SELECT CASE decided.kind WHEN 'rejection' THEN 'rejected' "
    "ELSE 'accepted' END FROM corrections AS decided WHERE decided.owner = corrections.owner "
    "AND decided.dispute = corrections.id), 'open') END"
)
_COLUMNS: Final = "number, id, kind, owner, request, at, actor, reason, amount, currency, dispute"
_INSERT: Final = f"INSERT INTO corrections ({_COLUMNS}) VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) RETURNING number"
OF_PERIOD: Final = (
    f"SELECT {_COLUMNS}, NULL FROM corrections WHERE kind = 'correction' AND at >= ? AND at < ? AND owner = ? "
    "ORDER BY number"
)


logger = logging.getLogger(__name__)


class CorrectionRefused(Exception):
    """A row cannot be added; `field` names what is wrong with it, and the message what would be right."""

    def __init__(self, message: str, field: str) -> None:
        super().__init__(message)
        self.field = field


class Made(NamedTuple):
    """What is asked for. `amount` is a decimal number, `dispute` the id of one that is decided."""

    id: str
    kind: Kind
    owner: str
    request: str
    reason: str
    amount: str | None = None
    currency: str | None = None
    dispute: str | None = None

    def require_valid(self) -> None:
        """Raise `CorrectionRefused` unless it has what its kind needs, and nothing else."""
        if (self.kind == "correction") != (self.amount is not None) or (self.amount is None) != (self.currency is None):
            raise CorrectionRefused("a correction has 'amount' and 'currency', and nothing else has them", "amount")
        if self.kind == "rejection" and self.dispute is None:
            raise CorrectionRefused("a rejection names the dispute in 'dispute_id'", "dispute_id")
        if self.kind == "dispute" and self.dispute is not None:
            raise CorrectionRefused("a dispute decides no other: leave 'dispute_id' out", "dispute_id")
        if self.amount is not None and (not _AMOUNT.fullmatch(self.amount) or not float(self.amount)):
            raise CorrectionRefused(
                f"'{self.amount}' is no amount: give a decimal number that is not 0, of at most 12 digits before "
                "the point and 9 after it, such as '-0.50'",
                "amount",
            )
        if self.currency is not None:
            try:
                parse_currency(self.currency)
            except InvalidName as error:
                raise CorrectionRefused(str(error), "currency") from error


class Correction(NamedTuple):
    """A row. `at` is microseconds of Unix time; `state` is a dispute's, as it is when it is read."""

    number: int
    id: str
    kind: Kind
    owner: str
    request: str
    at: int
    actor: str
    reason: str
    amount: str | None
    currency: str | None
    dispute: str | None
    state: State | None

    @property
    def made(self) -> Made:
        """What was asked for."""
        return Made(self.id, self.kind, self.owner, self.request, self.reason, self.amount, self.currency, self.dispute)


class Corrections:
    """The corrections of a ledger. Methods block; raises `LedgerError` where its file cannot be read or written.

    Attributes:
        lock: held from the dating of a row until it is on disk.
        closed: the end of the last month that any owner's was closed, in microseconds. Nothing is dated before it,
            whatever the clock says.
    """

    def __init__(self, path: Path, clock: Callable[[], float], file: FileIdentity, reserve: Reserve) -> None:
        """`file` is what `path` has to name, `reserve` the room on its disk that is kept for other rows."""
        self._path = path
        self._clock = clock
        self._file = file
        self._reserve = reserve
        self.lock = threading.Lock()
        with self.opened() as connection:
            (self.closed,) = connection.execute("SELECT coalesce(max(until), 0) FROM closings").fetchone()

    def close_until(self, until: int) -> None:
        """Date nothing before a time that is over, in microseconds."""
        with self.lock:
            self.closed = max(self.closed, until)

    def settled(self) -> bool:
        """Whether all corrections are on disk that were dated before this was called; waits for a moment."""
        if not self.lock.acquire(timeout=SETTLED_SECONDS):
            return False
        self.lock.release()
        return True

    def add(self, made: Made, *, actor: str, audit: Callable[[Correction], None]) -> Correction:
        """Add a row, once for its owner, kind and id: the same again is the row that there is.

        Args:
            audit: records it before it is added; what it raises prevents that.

        Raises:
            CorrectionRefused: it is not valid, or does not fit the rows that there are.
        """
        made.require_valid()
        with self.lock:
            self.require_room()
            with self.opened() as connection:
                known = _find(connection, made.owner, made.kind, made.id)
                if known is not None:
                    if known.made != made:
                        raise CorrectionRefused(f"the id '{made.id}' is taken: choose another one", "id")
                    return known
                _require_fitting(connection, made)
                (newest,) = connection.execute("SELECT coalesce(max(at), 0) FROM corrections").fetchone()
            now = microseconds(self._clock())
            at = max(newest, self.closed, now)
            if at - now > NOTICED_SECONDS * MICROSECONDS:
                behind = (at - now) // MICROSECONDS
                logger.error(
                    "the clock is %d seconds behind the newest correction or closed month: %s gets that time",
                    behind,
                    made.id,
                )
            state: State | None = "open" if made.kind == "dispute" else None
            row = Correction(0, *made[:4], at, actor, *made[4:], state)
            audit(row)
            with self.opened() as connection:
                (number,) = connection.execute(_INSERT, row[1:11]).fetchone()
            return row._replace(number=number)

    def read(self, owner: str | None, *, after: int, limit: int) -> list[Correction]:
        """Rows after a number in their order, of an owner or of all."""
        query = (
            f"SELECT {_COLUMNS}, {_STATE} FROM corrections WHERE number > ? AND (? IS NULL OR owner = ?) "
            "ORDER BY number LIMIT ?"
        )
        with self.opened() as connection:
            return [Correction(*row) for row in connection.execute(query, (after, owner, owner, limit))]

    def require_room(self) -> None:
        """Raise `LedgerError` where the disk has room for ends of requests alone."""
        try:
            self._reserve.require_room()
        except StoreFull as error:
            raise LedgerError(f"corrections cannot be written to {self._path}: {error}") from error

    @contextmanager
    def opened(self) -> Iterator[sqlite3.Connection]:
        """A connection whose changes are committed at the end, to the file that the ledger uses."""
        try:
            self._file.require()
            place = f"{self._path.absolute().as_uri()}?mode=rw"  # never makes a file
            with closing(sqlite3.connect(place, uri=True, timeout=BUSY_SECONDS)) as connection:
                connection.execute("PRAGMA synchronous = FULL")
                with connection:
                    yield connection
            self._file.require()
        except (sqlite3.Error, StoreReplaced) as error:
            raise LedgerError(
                f"the corrections in {self._path} cannot be read or written: {error}; check the file and its disk"
            ) from error


def _find(connection: sqlite3.Connection, owner: str, kind: Kind, id_: str) -> Correction | None:
    """The row of an id, of which each owner has its own, and each kind of row: no owner can take another row's."""
    query = f"SELECT {_COLUMNS}, {_STATE} FROM corrections WHERE owner = ? AND kind = ? AND id = ?"
    row = connection.execute(query, (owner, kind, id_)).fetchone()
    return None if row is None else Correction(*row)


def _require_fitting(connection: sqlite3.Connection, made: Made) -> None:
    """Raise `CorrectionRefused` for a receipt that is not the owner's, or a dispute that is not open.

    The receipt of a dispute was the owner's when it was opened, and may be deleted since.
    """
    query = "SELECT 1 FROM usage JOIN parts USING (sequence) WHERE request = ? AND owner = ?"
    if made.dispute is None and connection.execute(query, (made.request, made.owner)).fetchone() is None:
        raise CorrectionRefused(
            f"no expert of '{made.owner}' took part in a request '{made.request}' of this ledger: give a receipt's id",
            "receipt_id",
        )
    if made.dispute is not None:
        found = _find(connection, made.owner, "dispute", made.dispute)
        if found is None or found.request != made.request:
            raise CorrectionRefused(f"there is no dispute '{made.dispute}' of this receipt", "dispute_id")
        if found.state != "open":
            raise CorrectionRefused(f"the dispute '{made.dispute}' was {found.state} already", "dispute_id")
    if made.kind == "dispute":
        rows = connection.execute(f"SELECT request, {_STATE} AS state FROM corrections WHERE owner = ?", (made.owner,))
        opened = [request for request, state in rows if state == "open"]
        if made.request in opened:
            raise CorrectionRefused("a dispute of this receipt is open: wait until it is decided", "receipt_id")
        if len(opened) >= MOST_OPEN:
            raise CorrectionRefused(f"{MOST_OPEN:,} disputes are open: wait until some are decided", "receipt_id")
