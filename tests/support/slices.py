"""A seeded slice of what is heavy: `--slice SEED` keeps some cases of each test that is marked `sliced`.

`@pytest.mark.sliced(2)` keeps two cases of a parametrized test. With `of="name"` the choice is among the values of that
parameter, and with `family="name"` the tests of a file that give the same name are chosen from together. Without
`--slice` everything runs, as in `make verify`; the same seed chooses the same cases.
"""

from __future__ import annotations

import random
from typing import Any

import pytest


def add_option(parser: pytest.Parser) -> None:
    """Add `--slice`."""
    parser.addoption("--slice", metavar="SEED", help="of each test marked `sliced`, run the cases that SEED chooses")


def header(config: pytest.Config) -> str | None:
    """What repeats this run's choice."""
    seed = config.getoption("slice")
    return f"slices: --slice={seed} chooses among the tests marked `sliced`; without it all run" if seed else None


def keep(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what the seed does not choose."""
    if not (seed := config.getoption("slice")):
        return
    families: dict[str, dict[str, list[pytest.Item]]] = {}
    counts: dict[str, int] = {}
    for item in items:
        if mark := item.get_closest_marker("sliced"):
            family, case = _place(item, **mark.kwargs)
            counts[family] = mark.args[0]
            families.setdefault(family, {}).setdefault(case, []).append(item)
    left_out: set[pytest.Item] = set()
    for family, cases in families.items():
        chosen = random.Random(f"{seed} {family}").sample(sorted(cases), min(counts[family], len(cases)))
        left_out.update(item for case, found in cases.items() if case not in chosen for item in found)
    if left_out:
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = [item for item in items if item not in left_out]


def _place(item: Any, *, of: str | None = None, family: str | None = None) -> tuple[str, str]:
    """The family of a test, and which case of it this one is."""
    file = item.nodeid.split("::")[0]
    case = str(item.callspec.params[of]) if of else item.nodeid
    return f"{file}::{family or item.function.__qualname__}", case
