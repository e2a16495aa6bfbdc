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
MOST_TREES: Final = 2
"""That are kept; one over a million receipts takes 72 MB."""
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
    """The newest few of what was made, by what it is made of. From any thread; one makes at a time."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._made: dict[Hashable, Made] = {}

    def of(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What was made of `key`, or what `make` makes of it; what that raises is raised, and nothing is kept."""
        with self._lock:
            made = self._made.pop(key) if key in self._made else make()
            self._made[key] = made
            while len(self._made) > self._most:
                del self._made[next(iter(self._made))]
            return made


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
