"""A migrated store with the five experts in it, on SQLite."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from flexgate.policies.store import Store
from flexgate.policies.tenants import Expert

EXPERTS = [
    ("public", "commons"),
    ("news", "wire"),
    ("math", "institute"),
    ("code", "forge"),
    ("legal", "forge"),
]


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/policy.db"


@pytest.fixture
def empty(url: str) -> Iterator[Store]:
    store = Store.open(url)
    store.migrate()
    yield store
    store.close()


@pytest.fixture
def store(empty: Store) -> Store:
    with empty.change(actor="setup", at=1.0) as change:
        for id_, owner in EXPERTS:
            change.put(Expert(id=id_, owner=owner))
    return empty
