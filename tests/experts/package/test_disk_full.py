"""A disk that is full in the middle: a clear error, nothing that looks whole, and the work goes on afterwards."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from packagekit import ONE, make_package, statement, write_model

from flexgate.experts.checkpoint.base import BaseIdentity
from flexgate.experts.errors import OutputRefused
from flexgate.experts.package.extract import extract_expert
from flexgate.experts.package.merge import combine
from flexgate.experts.package.verify import open_package


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The kernel refuses to let a file grow beyond ``size``, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_extraction_says_so_and_goes_on_when_there_is_room_again(tmp_path: Path) -> None:
    write_model(tmp_path / "pair", replace(ONE, num_experts=2, num_experts_per_tok=2))
    with (
        largest_file(3000),
        pytest.raises(OutputRefused, match=r"package cannot be written: .*; run it again to go on"),
    ):
        extract_expert(tmp_path / "pair", "1", tmp_path / "package", statement=statement("news"))
    assert not (tmp_path / "package").exists()
    extract_expert(tmp_path / "pair", "1", tmp_path / "package", statement=statement("news"))


def test_verification_leaves_nothing(stock: Path, base: BaseIdentity, tmp_path: Path) -> None:
    with largest_file(3000), pytest.raises(OutputRefused, match="cannot be written"):
        open_package(stock / "news", base=base, trusted_keys=None, into=tmp_path / "copy")
    assert list(tmp_path.iterdir()) == []


def test_a_merge_leaves_nothing_that_looks_whole(stock: Path, base: BaseIdentity, tmp_path: Path) -> None:
    with open_package(stock / "news", base=base, trusted_keys=None, into=tmp_path / "copy") as package:
        with largest_file(3000), pytest.raises(OutputRefused, match="run it again to go on"):
            combine(stock / "anchor", [package], tmp_path / "merged", top_k=2)
        assert not (tmp_path / "merged").exists()
        combine(stock / "anchor", [package], tmp_path / "merged", top_k=2)


def test_a_package_is_not_half_written(stock: Path, tmp_path: Path) -> None:
    with largest_file(3000), pytest.raises(OutputRefused, match="cannot be written"):
        make_package(tmp_path / "package", stock / "anchor")
    assert not (tmp_path / "package").exists()
