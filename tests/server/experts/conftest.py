"""A base model and a policy store that knows the experts of its checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from catalogue import sync_catalogue
from packagekit import write_model
from slotkit.local import CHECKPOINT, Local, local

from flexgate.policies.store.store import Store


@pytest.fixture(scope="module")
def anchor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("anchor") / "model"
    write_model(path)
    return path


@pytest.fixture(scope="session")
def catalogued(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the experts of the checkpoint, to be copied: migrating takes longer than most tests."""
    path = tmp_path_factory.mktemp("catalogued") / "policy.db"
    made = Store.open(f"sqlite:///{path}")
    made.migrate()
    sync_catalogue(made, CHECKPOINT, at=1.0)
    made.close()
    return path


@pytest.fixture
def store(catalogued: Path, tmp_path: Path) -> Iterator[Store]:
    opened = Store.open(f"sqlite:///{shutil.copy(catalogued, tmp_path / 'policy.db')}")
    yield opened
    opened.close()


@pytest.fixture
def here(store: Store, anchor: Path, tmp_path: Path) -> Local:
    return local(store, anchor, tmp_path)
