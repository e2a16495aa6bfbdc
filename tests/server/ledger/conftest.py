"""A journal of the test's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from flexgate.server.ledger.journal import Journal


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


@pytest.fixture
def journal(path: Path) -> Iterator[Journal]:
    made = Journal(path, clock=lambda: 9.5)
    yield made
    made.close()
