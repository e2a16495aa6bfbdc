"""A scheduler for pytest's workers that hands out the units of `workers.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling


class UnitScheduling(LoadScopeScheduling):
    """Hand out whole units, in the order of the collection."""

    def __init__(self, config: pytest.Config, log: Any, file: Path) -> None:
        super().__init__(config, log)
        self._file = file
        self._units: dict[str, str] = {}

    def schedule(self) -> None:
        """Begin, now that every worker has collected."""
        self._units = self._units or json.loads(self._file.read_text())
        super().schedule()

    def _split_scope(self, nodeid: str) -> str:
        return self._units[nodeid]
