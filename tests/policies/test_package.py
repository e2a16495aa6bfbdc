"""What the package may import, and what others may rely on."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import flexgate.policies.decide
from flexgate.policies import errors, store

ROOT = Path(flexgate.policies.decide.__file__).parent
CORE = {"pydantic", "packaging", "pycountry", "rfc8785", "flexgate"}
STORE = CORE | {"sqlalchemy", "alembic"}
MODULES = sorted(ROOT.rglob("*.py"))


def _imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, path
            yield node.module


@pytest.mark.parametrize("path", MODULES, ids=[str(p.relative_to(ROOT)) for p in MODULES])
def test_imports_stay_inside_the_contract(path):
    may = STORE if "store" in path.relative_to(ROOT).parts else CORE
    if path == ROOT / "store/postgres.py":  # loaded where a database is PostgreSQL
        may = STORE | {"psycopg"}
    for name in _imported(path):
        top = name.split(".")[0]
        assert top in may or top in sys.stdlib_module_names, name
        if top == "flexgate":
            assert name.startswith("flexgate.policies"), name
            if may is CORE:
                assert not name.startswith("flexgate.policies.store"), name


@pytest.mark.parametrize("name", ["decide", "entitlements", "decision", "snapshot", "reasons", "audit"])
def test_the_core_reads_no_clock_and_no_environment(name):
    forbidden = {"time", "os", "random", "secrets", "uuid", "socket", "pathlib"}
    assert forbidden.isdisjoint(_imported(ROOT / f"{name}.py"))


@pytest.mark.parametrize("path", MODULES, ids=[str(p.relative_to(ROOT)) for p in MODULES])
def test_nothing_is_gated_by_an_assert(path):
    assert not any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(path.read_text())))


def test_every_error_has_the_one_root_and_is_in_the_drawing():
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    kinds = [kind for kind in kinds if kind.__module__ == errors.__name__]
    assert len(kinds) > 15
    for kind in kinds:
        assert issubclass(kind, errors.PolicyError)
        assert kind.__name__ in errors.__doc__


def test_public_names_of_the_store():
    assert store.__all__ == ["Change", "MintedKey", "Store"]
