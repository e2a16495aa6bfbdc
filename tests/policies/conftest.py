"""A small world: five experts of four owners, and a builder for variations of it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from flexgate.policies.agreements import Agreement
from flexgate.policies.decide import decide
from flexgate.policies.decision import Decision, DecisionRequest
from flexgate.policies.documents import Expert, ExpertSet, Tenant
from flexgate.policies.snapshot import Snapshot

NOW = 1_800_000_000.0

EXPERTS = [
    {"id": "public", "owner": "commons"},
    {"id": "news", "owner": "wire"},
    {"id": "math", "owner": "institute"},
    {"id": "code", "owner": "forge"},
    {"id": "legal", "owner": "forge"},
]


def agreement(id_: str = "a1", **fields: Any) -> dict[str, Any]:
    return {
        "id": id_,
        "owner": "wire",
        "experts": ["news"],
        "assignee": "everyone",
        "effect": "permit",
        **fields,
    }


def tenant(**fields: Any) -> dict[str, Any]:
    return {"id": "acme", "name": "Acme", **fields}


def build(
    agreements: list[dict[str, Any]] | None = None,
    tenants: list[dict[str, Any]] | None = None,
    experts: list[dict[str, Any]] | None = None,
    sets: list[dict[str, Any]] | None = None,
) -> Snapshot:
    return Snapshot.build(
        policy_version=7,
        experts=map(Expert.model_validate, experts or EXPERTS),
        tenants=map(Tenant.model_validate, tenants or [tenant()]),
        agreements=map(Agreement.model_validate, agreements or []),
        sets=map(ExpertSet.model_validate, sets or []),
    )


def ask(snapshot: Snapshot, *, now: float = NOW, who: str = "acme", **request: Any) -> Decision:
    return decide(snapshot, who, DecisionRequest(decision_id="dec_1", **request), now)


class World:
    """The builders above, handed to tests as one fixture."""

    now = NOW
    experts = EXPERTS
    agreement = staticmethod(agreement)
    tenant = staticmethod(tenant)
    build = staticmethod(build)
    ask = staticmethod(ask)

    @staticmethod
    def all_permitted(**fields: Any) -> list[dict[str, Any]]:
        return [
            agreement("p-news", owner="wire", experts=["news"], **fields),
            agreement("p-math", owner="institute", experts=["math"], **fields),
            agreement("p-forge", owner="forge", experts=["code", "legal"], **fields),
        ]

    @staticmethod
    def codes(decision: Decision) -> dict[str, str]:
        return {reason.expert: reason.code for reason in decision.excluded}


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def iso() -> Callable[[float], str]:
    from datetime import UTC, datetime

    return lambda seconds: datetime.fromtimestamp(seconds, UTC).isoformat()


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"policy_tests_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def oracle() -> ModuleType:
    return _load(Path(__file__).parents[1] / "oracle" / "policies.py")


@pytest.fixture(scope="session")
def worlds() -> ModuleType:
    return _load(Path(__file__).parent / "worlds.py")
