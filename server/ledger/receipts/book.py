"""The book of receipts: a SQLite file beside the ledger, in which signed batches are kept.

It is a file of its own, so that its commits never hold up the ledger's, for which tokens wait. Of each receipt it keeps
the number in the ledger and the root; the leaves are made again of the ledger's row whenever they are shown, and have
to lead to that root.
"""

from __future__ import annotations

import secrets
import sqlite3
import struct
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from flexgate.policies.store.identity import FileIdentity
from flexgate.server.ledger.receipts.batches import NOTHING_BEFORE, hash_of

APPLICATION: Final = 0x464C4752  # "FLGR", in the file's header
VERSION: Final = 1
ROOT_BYTES: Final = 32
SCHEMA: Final = """
CREATE TABLE server (id TEXT NOT NULL, secret BLOB NOT NULL);
CREATE TABLE keys (
    number INTEGER PRIMARY KEY,
    kid TEXT NOT NULL UNIQUE,
    public BLOB NOT NULL
);
CREATE TABLE batches (
    number INTEGER PRIMARY KEY,
    first INTEGER NOT NULL UNIQUE,
    last INTEGER NOT NULL UNIQUE,
    last_sequence INTEGER NOT NULL UNIQUE,
    sequences BLOB NOT NULL,
    roots BLOB NOT NULL,
    header BLOB NOT NULL,
    signature BLOB NOT NULL
);
CREATE TABLE policies (
    version INTEGER PRIMARY KEY,
    digest TEXT
);
"""


class BookError(Exception):
    """The book cannot be opened or written; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Batch:
    """A signed batch: numbers and roots of its receipts, in their order."""

    number: int
    first: int
    sequences: Sequence[int]
    roots: Sequence[bytes]
    header: bytes
    signature: bytes

    @property
    def last(self) -> int:
        """The number of its last receipt."""
        return self.first + len(self.roots) - 1


@dataclass(frozen=True, slots=True)
class End:
    """Where the chain ends; zeros before the first batch."""

    number: int
    last: int
    sequence: int
    hash: str


class Book:
    """An open book. Its methods block, and one thread uses it at a time."""

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        """Open or create the file; raises `BookError`."""
        self.path = path
        self._file = FileIdentity(path, "the file of receipts")
        place = f"{path.absolute().as_uri()}?mode={'ro' if read_only else 'rwc'}"
        with self._told("opened"):
            self._connection = sqlite3.connect(
                place, uri=True, isolation_level=None, check_same_thread=False, timeout=5.0
            )
            try:
                self._file.take()
                self._prepare()
                self.server, self.secret = self._connection.execute("SELECT id, secret FROM server").fetchone()
            except BaseException:
                self._connection.close()
                raise

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def keys(self) -> list[bytes]:
        """All public keys that batches were signed with, and last the one that signs now."""
        with self._told("read"):
            return [public for (public,) in self._connection.execute("SELECT public FROM keys ORDER BY number")]

    def add_key(self, kid: str, public: bytes) -> None:
        """Sign with this key from now on; one that was used before is taken again."""
        with self._transaction():
            self._connection.execute("DELETE FROM keys WHERE kid = ?", (kid,))
            number = "(SELECT coalesce(max(number), 0) + 1 FROM keys)"
            self._connection.execute(f"INSERT INTO keys VALUES ({number}, ?, ?)", (kid, public))

    def end(self) -> End:
        """The end of the chain."""
        with self._told("read"):
            query = "SELECT number, last, last_sequence, header FROM batches ORDER BY number DESC LIMIT 1"
            row = self._connection.execute(query).fetchone()
        if row is None:
            return End(0, 0, 0, NOTHING_BEFORE)
        number, last, sequence, header = row
        return End(number, last, sequence, hash_of(header))

    def append(self, batch: Batch) -> None:
        """Add a batch that follows the last one; raises `BookError` where it does not."""
        packed = struct.pack(f"<{len(batch.sequences)}q", *batch.sequences)
        with self._transaction():
            end = self.end()
            if (batch.number, batch.first) != (end.number + 1, end.last + 1) or batch.sequences[0] <= end.sequence:
                raise BookError(f"batch {batch.number} does not follow batch {end.number} in {self.path}")
            self._connection.execute(
                "INSERT INTO batches VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    batch.number,
                    batch.first,
                    batch.last,
                    batch.sequences[-1],
                    packed,
                    b"".join(batch.roots),
                    batch.header,
                    batch.signature,
                ),
            )

    def policy(self, version: int) -> str | None:
        """The digest of a policy version that receipts name; raises `KeyError` for one that none does yet."""
        with self._told("read"):
            row = self._connection.execute("SELECT digest FROM policies WHERE version = ?", (version,)).fetchone()
        if row is None:
            raise KeyError(version)
        digest: str | None = row[0]
        return digest

    def add_policy(self, version: int, digest: str | None) -> None:
        """Keep the digest that receipts name."""
        with self._transaction():
            self._connection.execute("INSERT INTO policies VALUES (?, ?)", (version, digest))

    def find(self, sequence: int) -> tuple[Batch, int] | None:
        """The batch of a request by its number in the ledger, and its place there; None where it has no receipt yet."""
        batch = self._first("last_sequence", sequence)
        if batch is None:
            return None
        place = bisect_left(batch.sequences, sequence)
        return (batch, place) if batch.sequences[place] == sequence else None

    def numbered(self, sequences: Iterable[int]) -> Iterator[tuple[int, bytes]]:
        """The number and root of each request's receipt; requests come in their order, and all have one."""
        batch, places = None, dict[int, int]()
        for sequence in sequences:
            if batch is None or sequence > batch.sequences[-1]:
                batch = self._first("last_sequence", sequence)
                places = {} if batch is None else {found: place for place, found in enumerate(batch.sequences)}
            if batch is None or sequence not in places:
                raise BookError(f"the request {sequence} of the ledger has no receipt in {self.path}")
            place = places[sequence]
            yield batch.first + place, batch.roots[place]

    def sequence_of(self, number: int) -> int:
        """The number in the ledger of the request that a receipt is of; where the chain ends before it, and 0 for 0."""
        if number == 0:
            return 0
        batch = self._first("last", number)
        return self.end().sequence if batch is None else batch.sequences[number - batch.first]

    def chain(self, after: int, limit: int) -> list[tuple[bytes, bytes]]:
        """Headers and signatures of batches after a number, in their order."""
        with self._told("read"):
            query = "SELECT header, signature FROM batches WHERE number > ? ORDER BY number LIMIT ?"
            return self._connection.execute(query, (after, limit)).fetchall()

    def _first(self, column: str, least: int) -> Batch | None:
        """The first batch whose last receipt's number, or request, is not below one."""
        with self._told("read"):
            query = f"SELECT * FROM batches WHERE {column} >= ? ORDER BY {column} LIMIT 1"
            row = self._connection.execute(query, (least,)).fetchone()
        return None if row is None else _batch(row)

    def _prepare(self) -> None:
        run = self._connection.execute
        (application,), (version,) = run("PRAGMA application_id").fetchone(), run("PRAGMA user_version").fetchone()
        if (application, version) != (APPLICATION, VERSION):
            if application == APPLICATION:
                raise BookError(f"{self.path} is of version {version}, not {VERSION}: use the newer flexgate")
            if run("SELECT count(*) FROM sqlite_master").fetchone() != (0,):
                raise BookError(f"{self.path} holds no receipts of flexgate: move it away, and start again")
            self._connection.executescript(
                f"BEGIN; {SCHEMA} PRAGMA application_id = {APPLICATION}; PRAGMA user_version = {VERSION}; "
                f"INSERT INTO server VALUES ('srv_{secrets.token_hex(16)}', x'{secrets.token_hex(32)}'); COMMIT;"
            )
            self.path.chmod(0o600)
        run("PRAGMA journal_mode = WAL")
        run("PRAGMA synchronous = FULL")

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """Raises `StoreReplaced` where the path names another file: a start would find nothing of what is written."""
        with self._told("written"):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._file.require()
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise BookError(
                f"the receipts {self.path} cannot be {what}: {error}; check the file and its disk"
            ) from error


@contextmanager
def opened(path: Path, *, read_only: bool = True) -> Iterator[Book]:
    """A book for one piece of work, which has to be there if it is only read."""
    with closing(Book(path, read_only=read_only)) as book:
        yield book


def _batch(row: Sequence[object]) -> Batch:
    number, first, _, _, packed, roots, header, signature = row
    assert isinstance(packed, bytes)
    assert isinstance(roots, bytes)
    sequences = [found for (found,) in struct.iter_unpack("<q", packed)]
    split = [roots[start : start + ROOT_BYTES] for start in range(0, len(roots), ROOT_BYTES)]
    return Batch(number, first, sequences, split, header, signature)  # type: ignore[arg-type]
