"""Merkle trees as in RFC 6962, section 2.1: SHA-256, with a leaf's hash apart from a node's."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Final

LEAF: Final = b"\x00"
NODE: Final = b"\x01"
HASH_BYTES: Final = 32
PIECE: Final = 10_000
"""Hashes between two rests."""
EMPTY: Final = hashlib.sha256().digest()
"""The root over no leaves."""


def leaf_hash(data: bytes) -> bytes:
    """The hash of a leaf."""
    return hashlib.sha256(LEAF + data).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """The hash of two subtrees."""
    return _node(left + right)


def _node(both: bytes) -> bytes:
    return hashlib.sha256(NODE + both).digest()


def levels(hashes: Iterable[bytes], *, rest: Callable[[], None] = lambda: None) -> list[bytes]:
    """The tree over leaves' hashes, from these to the root; a subtree without a right one moves up.

    Each level is the hashes of its nodes one behind the other, so that a tree over a million leaves takes 64 MB.

    Args:
        rest: called after each `PIECE` nodes.
    """
    packed = bytearray()
    for hash_ in hashes:
        packed += hash_
    found = [bytes(packed)]
    while len(below := found[-1]) > HASH_BYTES:
        places, above = range(0, len(below) - HASH_BYTES, 2 * HASH_BYTES), bytearray()
        for first in range(0, len(places), PIECE):
            above += b"".join([_node(below[at : at + 2 * HASH_BYTES]) for at in places[first : first + PIECE]])
            if len(places) >= PIECE:
                rest()
        found.append(bytes(above) + below[2 * HASH_BYTES * len(places) :])
    return found


def root(hashes: Iterable[bytes]) -> bytes:
    """The root over leaves' hashes."""
    return root_of(levels(hashes))


def root_of(tree: Sequence[bytes]) -> bytes:
    """The root of a tree (see `levels`)."""
    return tree[-1] or EMPTY


def path(tree: Sequence[bytes], index: int) -> list[bytes]:
    """The hashes that lead from a leaf of a tree (see `levels`) to its root, the lowest first."""
    found = []
    for level in tree[:-1]:
        at = (index ^ 1) * HASH_BYTES
        if at < len(level):
            found.append(level[at : at + HASH_BYTES])
        index >>= 1
    return found


def root_from(leaf: bytes, index: int, size: int, path: Sequence[bytes]) -> bytes | None:
    """The root that a path leads to from a leaf's hash; None where a tree of `size` leaves has no such path."""
    hash_, rest = leaf, list(path)
    if not 0 <= index < size:
        return None
    last = size - 1
    while last:
        if index & 1 or index < last:
            if not rest:
                return None
            other = rest.pop(0)
            hash_ = node_hash(other, hash_) if index & 1 else node_hash(hash_, other)
        index, last = index >> 1, last >> 1
    return None if rest else hash_
