"""Trees over an owner's receipts of a period, and what else is asked for again, made once for all that ask."""

from __future__ import annotations

import threading
import time
from array import array
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Final, Generic, NamedTuple, TypeVar

from flexgate.server.ledger.receipts import merkle
from flexgate.server.ledger.receipts.book import Book
from flexgate.server.ledger.statements import Period, reading_statements, sequences_read

Made = TypeVar("Made")
RECEIPT_BYTES: Final = 72
"""What a tree takes for each receipt."""
MOST_BYTES: Final = 288_000_000
"""Of all trees that are kept: one over four million receipts."""
REST_SECONDS: Final = 0.001
"""After each piece of a tree, so that the event loop gets on beside it."""


class Tree(NamedTuple):
    """An owner's receipts of a period: their numbers, which ascend, and the tree over their roots."""

    numbers: array[int]
    levels: list[bytes]

    @property
    def root(self) -> str:
        """As it is signed."""
        return merkle.root_of(self.levels).hex()


class Recent(Generic[Made]):
    """What was made of late, by what it is made of. From any thread; who asks for what is being made waits for it."""

    def __init__(self, most: int, size: Callable[[Made], int]) -> None:
        """Keep nothing yet, and later no more than `most` bytes of it; `size` says what one takes."""
        self._most = most
        self._size = size
        self._lock = threading.Lock()
        self._made: dict[Hashable, Made] = {}
        self._making: dict[Hashable, threading.Lock] = {}

    def of(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What was made of `key`, or what `make` makes of it; what that raises is raised, and nothing is kept."""
        with self._lock:
            making = self._making.setdefault(key, threading.Lock())
        with making:
            try:
                with self._lock:
                    if key in self._made:
                        self._made[key] = self._made.pop(key)  # the newest now
                        return self._made[key]
                made = make()
                with self._lock:
                    self._keep(key, made)
                return made
            finally:
                with self._lock:
                    self._making.pop(key, None)

    def _keep(self, key: Hashable, made: Made) -> None:
        self._made[key] = made
        while sum(map(self._size, self._made.values())) > self._most:
            del self._made[next(iter(self._made))]


def grow_tree(ledger: Path, book: Book, owner: str, period: Period, *, until: int) -> Tree:
    """The tree over the receipts of an owner's requests up to a number in the ledger. Blocks.

    Raises:
        LedgerError, BookError: a file cannot be read.
        TooMuchAsked: there are too many.
    """
    numbers = array("q")

    def leaves() -> Iterator[bytes]:
        with reading_statements(ledger) as reading:
            for number, root in book.numbered(sequences_read(reading, owner, period, until=until)):
                numbers.append(number)
                if len(numbers) % merkle.PIECE == 0:
                    rest()
                yield merkle.leaf_hash(root)

    return Tree(numbers, merkle.levels(leaves(), rest=rest))


def rest() -> None:
    """Let other threads run."""
    time.sleep(REST_SECONDS)
