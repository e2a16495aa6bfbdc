"""Merkle trees as in RFC 6962, section 2.1: SHA-256, with a leaf's hash apart from a node's."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Final

LEAF: Final = b"\x00"
NODE: Final = b"\x01"


def leaf_hash(data: bytes) -> bytes:
    """The hash of a leaf."""
    return hashlib.sha256(LEAF + data).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """The hash of two subtrees."""
    return hashlib.sha256(NODE + left + right).digest()


def levels(hashes: Sequence[bytes]) -> list[list[bytes]]:
    """The tree over one or more leaves' hashes, from these to the root; a subtree without a right one moves up."""
    found = [list(hashes)]
    while len(below := found[-1]) > 1:
        pairs = [node_hash(below[i], below[i + 1]) for i in range(0, len(below) - 1, 2)]
        found.append(pairs + below[len(pairs) * 2 :])
    return found


def root(hashes: Sequence[bytes]) -> bytes:
    """The root over one or more leaves' hashes."""
    return levels(hashes)[-1][0]


def path(tree: Sequence[Sequence[bytes]], index: int) -> list[bytes]:
    """The hashes that lead from a leaf of a tree (see `levels`) to its root, the lowest first."""
    found = []
    for level in tree[:-1]:
        if (sibling := index ^ 1) < len(level):
            found.append(level[sibling])
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
