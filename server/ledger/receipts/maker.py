"""Makes receipts of what the ledger has on disk, in the order of its rows, in a thread of its own.

Nothing waits for it. Where it cannot go on, since the signer or a file is missing, rows wait in the ledger, and it goes
on where it stopped: what follows the last signed batch has no receipt yet, and all before it has exactly one.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import threading
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Final

from flexgate.policies.errors import PolicyError
from flexgate.server.ledger.entries import microseconds
from flexgate.server.ledger.errors import LedgerError
from flexgate.server.ledger.reading import opened as opened_ledger
from flexgate.server.ledger.receipts import merkle, rows
from flexgate.server.ledger.receipts.batches import MOST, Header
from flexgate.server.ledger.receipts.book import Batch, Book, BookError, End
from flexgate.server.ledger.receipts.leaves import Recorded, grow
from flexgate.server.ledger.receipts.signing import KeyFile, Signer, SignerUnavailable, is_signed, jwk, thumbprint

SECONDS: Final = 0.25
"""Between two looks for new rows, which are signed together."""
MOST_SECONDS: Final = 30.0
"""The same while none can be made: it doubles from one look to the next."""
PIECE: Final = 16
REST_SECONDS: Final = 0.001
"""After each `PIECE` receipts, so that the event loop gets on beside a long queue."""
FAILED: Final = "the server failed to make receipts; its log names the cause"
EXPECTED: Final = (BookError, LedgerError, PolicyError, SignerUnavailable)

logger = logging.getLogger(__name__)


class Maker:
    """Makes receipts until it is closed.

    Attributes:
        waiting: why no receipts are made now, a sentence; None while they are.
        jwks: the public keys, as they are served.
        sequence: the number of the ledger's last request that has a receipt.
        signer: what signs.
        signed: the sequence in the ledger up to which requests have receipts, as far as it is known.
    """

    def __init__(
        self,
        ledger: Path,
        book: Book,
        signer: Signer,
        *,
        clock: Callable[[], float],
        policy_digest: Callable[[int], str | None],
        pseudonym: Callable[[str, str], str],
    ) -> None:
        """`policy_digest` and `pseudonym` are those of `flexgate.server.ledger.receipts.leaves.grow`; the former may
        block, and raise `PolicyError`.
        """
        self.waiting: str | None = None
        self._ledger = ledger
        self._book = book
        self.signer = signer
        self._clock = clock
        self._policy_digest = policy_digest
        self._pseudonym = lru_cache(maxsize=10_000)(pseudonym)
        self._digests: dict[int, str | None] = {}  # of the batch that is made
        self._refused: str | None = None  # empty where the ledger was found to be the one of the receipts
        self.sequence = book.end().sequence
        self.signed = 0
        self._closing = threading.Event()
        self._prepare_key()
        self._thread = threading.Thread(target=self._run, name="flexgate-receipts", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def close(self) -> None:
        """Make one more batch, if that is possible now, and close the book. Blocks."""
        self._closing.set()
        if self._thread.ident is not None:
            self._thread.join()
            self.work()
        self._book.close()

    def work(self) -> None:
        """Make receipts of all that has none."""
        try:
            while self._make_batch() and not self._closing.is_set():
                pass
            self._note(None)
        except EXPECTED as error:
            self._note(str(error))
        except Exception as error:
            if self.waiting != FAILED:
                logger.error("receipts cannot be made", exc_info=error)
            self._note(FAILED)

    def _run(self) -> None:
        seconds = SECONDS
        while not self._closing.wait(seconds):
            self.work()
            seconds = SECONDS if self.waiting is None else min(2 * seconds, MOST_SECONDS)

    def _note(self, waiting: str | None) -> None:
        if waiting != self.waiting and waiting is not None:
            logger.error("no receipts are made, and requests wait for theirs: %s", waiting)
        elif waiting is None and self.waiting is not None:
            logger.warning("receipts are made again")
        self.waiting = waiting

    def _prepare_key(self) -> None:
        """Make a key where there never was one; no other key is taken without being asked for."""
        keys = self._book.keys()
        if not keys:
            try:
                if isinstance(self.signer, KeyFile) and not self.signer.path.exists():
                    self.signer.make()
                public = self.signer.public_key()
                self._book.add_key(thumbprint(public), public)
                keys = [public]
            except EXPECTED as error:
                self._note(str(error))
        self.jwks = jwks_of(keys)

    def _make_batch(self) -> bool:
        """Sign what follows the last batch; whether there may be more."""
        end = self._book.end()
        with opened_ledger(self._ledger) as connection:
            self._require_same_ledger(end, connection)
            found = rows.read_after(connection, end.sequence, MOST)
        self.signed = end.sequence
        if not found:
            return False
        self.jwks = jwks_of(self._book.keys())
        public = current_key(self._book, self.signer)
        roots = self._roots(found)
        header = Header(
            at=str(microseconds(self._clock())),
            first=str(end.last + 1),
            kid=thumbprint(public),
            last=str(end.last + len(found)),
            number=str(end.number + 1),
            previous=end.hash,
            root=merkle.root([merkle.leaf_hash(root) for root in roots]).hex(),
            server=self._book.server,
        ).encode()
        signature = signed(self.signer, public, header)
        sequences = [recorded.sequence for recorded in found]
        self._book.append(Batch(end.number + 1, end.last + 1, sequences, roots, header, signature))
        self.sequence = sequences[-1]
        self.signed = sequences[-1]
        return len(found) == MOST

    def _roots(self, found: list[Recorded]) -> list[bytes]:
        secret, pseudonym, roots = self._book.secret, self._pseudonym, []
        self._digests = {version: self._policy(version) for version in {one.policy_version for one in found}}
        for place, one in enumerate(found, start=1):
            digest = self._digests[one.policy_version]
            roots.append(grow(one, secret=secret, policy_digest=digest, pseudonym=pseudonym).root)
            if place % PIECE == 0:
                time.sleep(REST_SECONDS)
        return roots

    def _policy(self, version: int) -> str | None:
        if version in self._digests:
            return self._digests[version]
        try:
            return self._book.policy(version)
        except KeyError:
            digest = self._policy_digest(version)
            self._book.add_policy(version, digest)
            return digest

    def _require_same_ledger(self, end: End, connection: sqlite3.Connection) -> None:
        """Refuse a ledger that is older than its receipts, until the next start: its numbers name other requests."""
        if self._refused is None:
            self._refused = (
                ""
                if self._is_same_ledger(end, connection)
                else (
                    f"the ledger {self._ledger} does not have the request of the last receipt in {self._book.path} at "
                    f"number {end.sequence}: it is older than its receipts, or was changed; "
                    "restore the newer ledger, and start again"
                )
            )
        if self._refused:
            raise LedgerError(self._refused)

    def _is_same_ledger(self, end: End, connection: sqlite3.Connection) -> bool:
        """Whether the row of the last receipt leads to its root; one that retention has deleted cannot be compared."""
        if end.number == 0:
            return True
        if rows.newest(connection) < end.sequence:
            return False
        found, last = rows.read_after(connection, end.sequence - 1, 1), self._book.find(end.sequence)
        if not found or found[0].sequence != end.sequence or last is None:
            return True
        batch, place = last
        return self._roots(found) == [batch.roots[place]]


def current_key(book: Book, signer: Signer) -> bytes:
    """The key that signs; raises `SignerUnavailable` where the signer has another one, or none does."""
    keys, public = book.keys(), signer.public_key()
    if not keys or keys[-1] != public:
        was = "none" if not keys else thumbprint(keys[-1])
        raise SignerUnavailable(
            f"the receipt signer has the key {thumbprint(public)}, and receipts are signed with {was}: {_ROTATE}"
        )
    return public


def signed(signer: Signer, public: bytes, message: bytes) -> bytes:
    """A signature with the key; raises `SignerUnavailable`."""
    signature = signer.sign(message)
    if not is_signed(public, message, signature):
        raise SignerUnavailable("the receipt signer has given a signature with another key: " + _ROTATE)
    return signature


_ROTATE: Final = (
    "run 'flexgate receipts rotate-key' to sign with the signer's key from now on, or restore the former key"
)


def jwks_of(keys: list[bytes]) -> bytes:
    """The set of public keys as canonical JSON, the newest last."""
    return json.dumps({"keys": [jwk(public) for public in keys]}, sort_keys=True, separators=(",", ":")).encode()
