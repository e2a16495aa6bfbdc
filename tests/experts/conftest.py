"""A small anchor, an owner's keys and a signed package, made once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from packagekit import make_package, write_model

from flexgate.experts.checkpoint.base import BaseIdentity, base_identity
from flexgate.experts.package.signature import TrustedKeys, generate
from flexgate.experts.package.verify import VerifiedPackage, open_package


@pytest.fixture(scope="session")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``anchor``, ``keys`` (owners acme and other) and the signed package ``news``."""
    root = tmp_path_factory.mktemp("stock")
    write_model(root / "anchor")
    for owner in ("acme", "other"):
        generate(owner, root / "keys")
    make_package(root / "news", root / "anchor", key=root / "keys/acme.key")
    return root


@pytest.fixture(scope="session")
def base(stock: Path) -> BaseIdentity:
    """The anchor's identity."""
    return base_identity(stock / "anchor")


@pytest.fixture
def package(stock: Path, tmp_path: Path) -> Path:
    """A copy of the signed package, to be damaged."""
    return Path(shutil.copytree(stock / "news", tmp_path / "news"))


@pytest.fixture
def opened(stock: Path, base: BaseIdentity, tmp_path: Path) -> Callable[[Path], VerifiedPackage]:
    """Open a package as a server would."""
    trusted = TrustedKeys.from_directory(stock / "keys")
    return lambda path: open_package(path, base=base, trusted_keys=trusted, into=tmp_path / "copy")
