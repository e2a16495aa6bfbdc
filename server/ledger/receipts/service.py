"""Receipts as they are shown: to each party its leaves, made again of the ledger's row and compared with the root."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, NamedTuple

from flexgate.server.ledger.reading import opened as opened_ledger
from flexgate.server.ledger.receipts import merkle, rows, trees
from flexgate.server.ledger.receipts.batches import FORMAT, parsed
from flexgate.server.ledger.receipts.book import Batch, Book, opened
from flexgate.server.ledger.receipts.leaves import Leaves, Recorded, grow
from flexgate.server.ledger.receipts.maker import Maker
from flexgate.server.ledger.receipts.signing import Signer
from flexgate.server.ledger.receipts.trees import Recent, Tree

Json = dict[str, Any]
MOST_BYTES: Final = 64 << 20
"""Of all signed statements that are kept, of at most 16 MiB each."""


@dataclass(frozen=True, slots=True)
class Reader:
    """Who asks: a tenant, an owner, or with neither an auditor or administrator, who sees every leaf."""

    tenant: str | None = None
    owner: str | None = None

    @property
    def is_operator(self) -> bool:
        """Whether it sees every leaf."""
        return self.tenant is None and self.owner is None

    def may_see(self, tenant: str, owners: list[str]) -> bool:
        """Whether a request concerns it, by the request's tenant and the owners of what took part."""
        return self.is_operator or tenant == self.tenant or self.owner in owners

    def sees(self, kind: str, owner: str | None) -> bool:
        """Whether its copy shows a leaf of a kind, and of an owner."""
        if self.tenant is not None:
            return kind == "request"
        return self.is_operator or (kind == "owner" and owner == self.owner)


class Signed(NamedTuple):
    """Canonical JSON, and its signature."""

    message: bytes
    signature: bytes


class NoReceipt(Exception):
    """There is none of this id that the reader may see."""


class ReceiptPending(Exception):
    """The request is recorded, and its receipt is not made yet; the message says why, if there is a reason."""


class ReceiptDamaged(Exception):
    """The ledger's row does not lead to the root that was signed: one of the two was changed."""


class Receipts:
    """The receipts of a server. `ledger` is the file that they are made of, `book` that of their batches."""

    def __init__(self, ledger: Path, book: Path, maker: Maker, pseudonym: Callable[[str, str], str]) -> None:
        self.maker = maker
        self.ledger = ledger
        self.book = book
        self._pseudonym = pseudonym
        self.trees = Recent[Tree](trees.MOST_BYTES, lambda tree: trees.RECEIPT_BYTES * len(tree.numbers))
        self.statements = Recent[Signed](MOST_BYTES, lambda signed: len(signed.message))

    @property
    def jwks(self) -> bytes:
        """The public keys, as canonical JSON."""
        return self.maker.jwks

    def show(self, receipt: str, reader: Reader) -> Json:
        """A reader's copy, whose members are in the order of their names. Blocks.

        Raises:
            NoReceipt, ReceiptPending, ReceiptDamaged: there is nothing to show.
            LedgerError, BookError: a file cannot be read.
        """
        with opened_ledger(self.ledger) as connection:
            recorded = rows.read_one(connection, receipt)
            running = rows.read_running(connection, receipt) if recorded is None else None
        if running is not None and reader.owner is None and reader.may_see(running.tenant, []):
            raise ReceiptPending("the request has not ended")
        if recorded is None or not reader.may_see(recorded.tenant, recorded.owners):
            raise NoReceipt
        with opened(self.book) as book:
            return self._shown(book, recorded, reader)

    def show_all(self, sequences: Sequence[int], reader: Reader) -> list[Json]:
        """A reader's copies of the receipts of requests that it may see, by their numbers in the ledger; as `show`."""
        with opened_ledger(self.ledger) as connection:
            found = [one for sequence in sequences for one in rows.read_after(connection, sequence - 1, 1)]
        with opened(self.book) as book:
            return [self._shown(book, recorded, reader) for recorded in found]

    def _shown(self, book: Book, recorded: Recorded, reader: Reader) -> Json:
        found = book.find(recorded.sequence)
        if found is None:
            raise ReceiptPending(self.maker.waiting or "it is made within a second")
        batch, place = found
        leaves = self._grown(recorded, book)
        if leaves.root != batch.roots[place]:
            raise ReceiptDamaged(
                f"the ledger's row {recorded.sequence} (receipt '{recorded.request}') does not lead to the root that "
                "was signed: it or the receipts' file was changed since"
            )
        return copy_of(batch, place, leaves, reader)

    def chain(self, after: int, limit: int) -> list[Json]:
        """The signed headers of batches after a number, in their order. Blocks; raises `BookError`."""
        with opened(self.book) as book:
            return [_signed(*one) for one in book.chain(after, limit)]

    def newest(self) -> list[Json]:
        """The signed header of the newest batch, if there is one. Blocks; raises `BookError`."""
        with opened(self.book) as book:
            return [_signed(*one) for one in book.chain(book.end().number - 1, 1)]

    def _grown(self, recorded: Recorded, book: Book) -> Leaves:
        digest = book.policy(recorded.policy_version)
        return grow(recorded, secret=book.secret, policy_digest=digest, pseudonym=self._pseudonym)


def _signed(header: bytes, signature: bytes) -> Json:
    return {"header": parsed(header), "signature": signature.hex()}


def copy_of(batch: Batch, place: int, leaves: Leaves, reader: Reader) -> Json:
    """The receipt at a place of its batch, with the leaves that a reader sees."""
    shown = [
        {"content": parsed(content), "index": index, "salt": salt.hex()}
        for index, (salt, (kind, owner, content)) in enumerate(leaves.leaves)
        if reader.sees(kind, owner)
    ]
    above = _tree_over(b"".join(batch.roots))
    return {
        "batch": {
            "header": parsed(batch.header),
            "path": [hash_.hex() for hash_ in merkle.path(above, place)],
            "signature": batch.signature.hex(),
        },
        "format": FORMAT,
        "hashes": [hash_.hex() for hash_ in leaves.hashes],
        "leaves": shown,
        "number": str(batch.first + place),
        **({"opening": leaves.opening.hex()} if reader.tenant is not None else {}),
    }


@lru_cache(maxsize=16)
def _tree_over(roots: bytes) -> list[bytes]:
    """The tree of a batch, by its receipts' roots: readers ask for one receipt of a batch after the other."""
    starts = range(0, len(roots), merkle.HASH_BYTES)
    return merkle.levels(merkle.leaf_hash(roots[start : start + merkle.HASH_BYTES]) for start in starts)


@contextmanager
def kept(
    directory: Path,
    ledger: Path,
    signer: Signer,
    *,
    clock: Callable[[], float],
    policy_digest: Callable[[int], str | None],
    pseudonym: Callable[[str, str], str],
) -> Iterator[Receipts]:
    """The receipts of a state directory; `receipts.maker.start` begins to make them. Arguments as `Maker` takes them.

    Raises:
        BookError: their file cannot be opened.
    """
    path = directory / NAME
    maker = Maker(ledger, Book(path), signer, clock=clock, policy_digest=policy_digest, pseudonym=pseudonym)
    try:
        yield Receipts(ledger, path, maker, pseudonym)
    finally:
        maker.close()


NAME: Final = "receipts.db"
