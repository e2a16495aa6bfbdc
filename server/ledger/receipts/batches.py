"""Batches of receipts: one Merkle root and one signature over many, each naming the batch before it."""

from __future__ import annotations

import hashlib
from typing import Any, Final

import msgspec

FORMAT: Final = "flexgate-receipt/1"
BATCH_FORMAT: Final = "flexgate-receipt-batch/1"
MOST: Final = 1024
"""Receipts of one batch."""
NOTHING_BEFORE: Final = "0" * 64


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """What is signed, as canonical JSON; attributes stand in the order of their names.

    `first` and `last` are the numbers of its receipts, which a server counts from 1 on without a gap; `number` is the
    batch's own, and `previous` the hash of the header before it. `at` is microseconds of Unix time.
    """

    at: str
    first: str
    format: str = BATCH_FORMAT
    kid: str
    last: str
    number: str
    previous: str
    root: str
    server: str

    def encode(self) -> bytes:
        """The message that is signed."""
        return msgspec.json.encode(self)


def hash_of(header: bytes) -> str:
    """What the next batch names."""
    return hashlib.sha256(header).hexdigest()


def parsed(text: bytes) -> dict[str, Any]:
    """Canonical JSON as an object whose members keep their order."""
    found: dict[str, Any] = msgspec.json.decode(text)
    return found
