"""How tests are spread over pytest's workers: every engine starts once, and what takes longest starts first.

Nothing is listed by hand. A fixture of a module or of the session that has something to end (`yield`) keeps it running
from test to test: the tests that share it form a unit, which one worker runs from beginning to end. Of the others, each
that is slow or starts an engine of its own is a unit unless it uses a fixture of its module; what is left goes by file.

pytest 9.2 no longer reads the ids that xdist writes `loadgroup` into, so units have a scheduler of their own.
Workers collect and know the fixtures, the controller schedules: the units pass from one to the other in a file.
"""

from __future__ import annotations

import inspect
import json
import os
import tempfile
from collections import Counter
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any

import pytest

SHARED = ("session", "package", "module")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Take the place of xdist's `loadgroup`."""
    from scheduling import UnitScheduling  # needs xdist, which a run in one process does not

    return UnitScheduling(config, log, _file(config)) if config.getoption("dist") == "loadgroup" else None


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell a worker where to put the units; all find the same."""
    node.workerinput["units"] = str(_file(node.config))


def spread(config: Any, items: list[pytest.Item]) -> None:
    """In a worker, sort the longest units to the front and write all of them down."""
    if not getattr(config.option, "loadgroup", False):
        return
    units = assign(items)
    sizes = Counter(units.values())

    def turn(item: pytest.Item) -> tuple[bool, bool, int]:
        unit = units[item.nodeid]
        return not unit.startswith("shared-"), not _is_heavy(item), -sizes[unit]

    items.sort(key=turn)
    file = Path(config.workerinput["units"])
    own = file.with_suffix(f".{os.getpid()}")
    own.write_text(json.dumps(units))
    own.replace(file)


def assign(items: list[pytest.Item]) -> dict[str, str]:
    """The unit of every test, both by name."""
    held = {item.nodeid: list(kept_running(item)) for item in items}
    leaders: dict[Hashable, Hashable] = {}

    def leader(fixture: Hashable) -> Hashable:
        while leaders.setdefault(fixture, fixture) != fixture:
            fixture = leaders[fixture]
        return fixture

    for first, *others in filter(None, held.values()):
        for other in others:
            leaders[leader(other)] = leader(first)
    names: dict[Hashable, str] = {}

    def unit(item: pytest.Item) -> str:
        if fixtures := held[item.nodeid]:
            return names.setdefault(leader(fixtures[0]), f"shared-{len(names)}")
        return item.nodeid if _is_heavy(item) and not _shares_with_its_file(item) else item.nodeid.split("::")[0]

    return {item.nodeid: unit(item) for item in items}


def kept_running(item: Any) -> Iterator[Hashable]:
    """The instances of fixtures that this test may share with others and that have something to end."""
    definitions = {name: found[-1] for name, found in item._fixtureinfo.name2fixturedefs.items()}
    chosen = item.callspec.params if hasattr(item, "callspec") else {}  # indices count within one parametrize
    for name, definition in definitions.items():
        if definition.scope in SHARED and inspect.isgeneratorfunction(definition.func):
            needed = _closure(name, definitions)
            choice = tuple((other, repr(value)) for other, value in chosen.items() if other in needed)
            yield name, item.path if definition.scope == "module" else definition.baseid, choice


def _closure(name: str, definitions: dict[str, Any]) -> set[str]:
    """A fixture and all that it needs."""
    needed = definitions[name].argnames if name in definitions else ()
    return {name}.union(*(_closure(other, definitions) for other in needed if other != name))


def _shares_with_its_file(item: Any) -> bool:
    return any(found[-1].scope == "module" for found in item._fixtureinfo.name2fixturedefs.values())


def _is_heavy(item: pytest.Item) -> bool:
    return any(item.get_closest_marker(mark) for mark in ("engine", "slow"))


def _file(config: Any) -> Path:
    """Where the controller looks for the units."""
    if not hasattr(config, "units_folder"):
        config.units_folder = tempfile.TemporaryDirectory(prefix="units")
    return Path(config.units_folder.name) / "units.json"
