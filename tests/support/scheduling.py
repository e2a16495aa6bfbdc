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

    def _reschedule(self, node: Any) -> None:
        """Give a worker one test beside that which it runs: it needs to know the next, and others may be idle.

        One that took the place of a worker that died gets none before it has collected.
        """
        collected = node in self.registered_collections
        if collected and not (self.workqueue and self._pending_of(self.assigned_work[node]) > 1):
            super()._reschedule(node)

    def remove_node(self, node: Any) -> str | None:
        """Give others what a worker that died had left, but for the test that it died of, which is returned."""
        units = self.assigned_work[node]
        died_of = next((test for unit in units.values() for test, done in unit.items() if not done), None)
        if died_of is not None:
            units[self._units[died_of]][died_of] = True
        for name in [name for name, unit in units.items() if all(unit.values())]:
            del units[name]  # a worker that is given nothing waits for ever
        super().remove_node(node)
        return died_of

    def _split_scope(self, nodeid: str) -> str:
        return self._units[nodeid]
