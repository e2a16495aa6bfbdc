"""What an engine core and the processes that follow its grammars send each other, one packet at a time.

A packet is 32-bit integers: what it is, the number of the request within its process, and then token ids, or the words
of a mask, with one bit per token.
"""

from array import array
from collections.abc import Iterable
from typing import Final

OPEN: Final = 0  # to a process: begin to follow; the ids of tokens that end the answer
ADVANCE: Final = 1  # to a process: the ids of sampled tokens
CLOSE: Final = 2  # to a process: forget the request
COMPILED: Final = 3  # from a process: KiB that the grammar takes
MASK: Final = 4  # from a process: what may come next
ENDED: Final = 5  # from a process: the answer is complete
REFUSED: Final = 6  # from a process: a sampled token was none that might come next
BEYOND_LIMITS: Final = 7  # of a process, from the one that began it: the kernel ended it at a limit
MAX_PACKET: Final = 1 << 16
"""Bytes: a mask of half a million tokens."""

_HEAD: Final = 2


def pack(what: int, request: int, values: Iterable[int] = ()) -> bytes:
    """A packet."""
    return array("i", (what, request, *values)).tobytes()


def pack_mask(request: int, words: bytes) -> bytes:
    """A packet with a mask, which is bytes already."""
    return pack(MASK, request) + words


def unpack(packet: bytes) -> "tuple[int, int, array[int]]":
    """What it is, the number of its request, and the rest."""
    numbers = array("i", packet)
    return numbers[0], numbers[1], numbers[_HEAD:]
