"""Paths lead from each leaf to the root, and from nothing else."""

from __future__ import annotations

import hashlib

import pytest

from flexgate.server.ledger.receipts import merkle
from flexgate.server.ledger.receipts.merkle import leaf_hash, levels, node_hash, path, root, root_from

# Roots of RFC 6962's reference implementation over its eight example leaves.
LEAVES = [bytes.fromhex(one) for one in ("", "00", "10", "2021", "3031", "40414243", "5051525354555657")]
LEAVES.append(bytes.fromhex("606162636465666768696a6b6c6d6e6f"))
ROOTS = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]


@pytest.mark.parametrize("size", range(1, 9))
def test_roots_are_those_of_the_reference(size: int) -> None:
    assert root([leaf_hash(leaf) for leaf in LEAVES[:size]]).hex() == ROOTS[size - 1]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 13, 64, 100])
def test_a_path_leads_from_its_leaf_to_the_root_and_from_no_other_place(size: int) -> None:
    hashes = [leaf_hash(bytes([number])) for number in range(size)]
    tree = levels(hashes)
    for index in range(size):
        found = path(tree, index)
        assert root_from(hashes[index], index, size, found) == root(hashes)
        assert root_from(hashes[index], index, size, [*found, b"x" * 32]) is None
        for other in range(size):
            assert other == index or root_from(hashes[index], other, size, found) != root(hashes)
    assert root_from(hashes[0], size, size, path(tree, 0)) is None
    assert root_from(hashes[0], -1, size, path(tree, 0)) is None


def test_no_node_passes_for_a_leaf() -> None:
    left, right = leaf_hash(b"a"), leaf_hash(b"b")
    assert leaf_hash(left + right) != node_hash(left, right)
    assert root([leaf_hash(left + right)]) != root([left, right])
    assert leaf_hash(b"a") != hashlib.sha256(b"a").digest()


@pytest.mark.parametrize("size", [0, 1, 2, 7, 8, 9, 30, 33])
def test_a_tree_that_is_made_in_pieces_is_the_same(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    hashes, rests = [leaf_hash(bytes([number])) for number in range(size)], list[bool]()
    whole = levels(hashes)
    monkeypatch.setattr(merkle, "PIECE", 4)
    assert levels(hashes, rest=lambda: rests.append(True)) == whole
    assert len(rests) >= size // 8
