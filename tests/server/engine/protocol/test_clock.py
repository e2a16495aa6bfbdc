"""A clock that is set back brings nothing back: neither an agreement that ended nor a key that did."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from slotkit.local import Local, local

from flexgate.policies.agreements import Agreement
from flexgate.policies.documents import Role
from flexgate.policies.store import Store, history
from flexgate.server.engine.protocol.clock import Clock
from flexgate.server.http.auth import authenticate
from flexgate.server.inference.request.limits import Limits
from flexgate.server.lifecycle import bootstrap, container, serve
from flexgate.server.lifecycle.console import Started
from flexgate.server.lifecycle.settings import Settings
from flexgate.server.policy.source import PolicySource

NOON = datetime(2026, 11, 28, 12, tzinfo=UTC).timestamp()
MATH = {"owner": "academy", "experts": ["math"], "assignee": "everyone", "effect": "permit", "version": 2}


class Machine:
    """Two clocks of a machine: one that can be set, and one that only goes on."""

    def __init__(self) -> None:
        self.wall, self.steady = NOON, 5.0

    def passes(self, seconds: float, *, and_set: float = 0.0) -> None:
        self.steady += seconds
        self.wall += seconds + and_set


@pytest.fixture
def machine() -> Machine:
    return Machine()


@pytest.fixture
def clock(machine: Machine) -> Clock:
    return Clock(lambda: machine.wall, lambda: machine.steady)


def test_time_goes_on_from_the_latest_that_was_seen(clock: Clock, machine: Machine) -> None:
    assert clock() == NOON
    machine.passes(10)
    assert clock() == NOON + 10
    machine.passes(10, and_set=-3600)
    assert clock() == NOON + 20
    machine.passes(10, and_set=-3600)
    assert clock() == NOON + 30
    machine.passes(10, and_set=9000)
    assert clock() == NOON + 40 + 1800


def test_a_clock_that_went_back_is_logged_once_for_each_time(
    clock: Clock, machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR, "flexgate.server.engine.protocol.clock")
    for and_set in (-0.5, -3600, 0, 0, 3601, -60, 0):
        machine.passes(1, and_set=and_set)
        clock()
    said = [record.getMessage() for record in caplog.records]
    assert [line.partition(":")[0] for line in said] == [
        "the machine's clock went back by 3600 seconds",
        "the machine's clock went back by 60 seconds",
    ]


@pytest.mark.asyncio
async def test_what_has_ended_stays_ended(services: Any, real_store: Store, machine: Machine, make_client: Any) -> None:
    services.clock = Clock(lambda: machine.wall, lambda: machine.steady)
    services.policy = PolicySource(real_store, lambda: {"public": 1, "math": 1}, lease_s=60, poll_s=1)
    with real_store.change(actor="test", at=NOON) as change:
        change.put(Agreement.model_validate({**MATH, "id": "a-math", "not_after": "2026-11-28T12:01:00Z"}))
        key = change.mint_key(Role.TENANT, tenant_id="u", expires=NOON + 60).secret
    services.policy.confirm()

    async def asked() -> tuple[int, bool]:
        async with make_client(key) as http:
            status = (await http.get("/v1/experts")).status_code
        async with make_client("sk-u") as http:
            math = (await http.get("/v1/experts/math")).json()
        return status, math["allowed"]

    assert await asked() == (200, True)
    machine.passes(60)
    assert await asked() == (401, False)
    machine.passes(1, and_set=-3600)
    assert await asked() == (401, False)


@pytest.mark.asyncio
async def test_a_clock_set_back_while_the_engine_starts_stamps_nothing(
    text_checkpoint: Path, tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything that a start does, around experts on plain tensors in place of an engine."""
    settings = Settings(model=text_checkpoint, port=0, state_dir=tmp_path / "state")
    store = Store.open(settings.database())
    here: list[Local] = []
    clocks: list[Clock] = []

    @asynccontextmanager
    async def launch(*_: object, clock: Clock) -> AsyncIterator[Local]:
        clocks.append(clock)
        machine.passes(60, and_set=-3600)
        here.append(local(store, text_checkpoint, tmp_path))
        yield here[0]

    async def run(_: Settings, services: Any, *_sockets: object) -> None:
        assert services.started == services.clock() == NOON + 60
        assert services.clock is clocks[0]  # that of the engine's client
        await services.experts.revoke("news", actor="key_admin")

    monkeypatch.setattr(bootstrap, "Clock", lambda: Clock(lambda: machine.wall, lambda: machine.steady))
    monkeypatch.setattr(bootstrap, "launch", launch)
    monkeypatch.setattr(container, "build_handlers", lambda *_, **__: SimpleNamespace())
    monkeypatch.setattr(container, "_limits", lambda *_, **__: Limits())
    monkeypatch.setattr(bootstrap, "_settle_heap", lambda: None)  # else the tests' own heap stays for ever
    monkeypatch.setattr(serve, "run", run)
    told: list[Started] = []
    await bootstrap.serve(settings, text_checkpoint, stage=lambda *_: None, ready=told.append)
    assert authenticate(store.snapshot(), f"Bearer {told[0].admin_key}", NOON + 60).role is Role.ADMIN
    assert store.weights().last["news"].at == NOON + 60
    (cleared,) = [entry for entry in store.audit_log(limit=100) if entry.action == "weights.cleared"]
    assert (cleared.at, cleared.detail["requested_at"], cleared.detail["effective_at"]) == (NOON + 60,) * 3
    assert {revision.at for revision in history.newest_revisions(store)} <= {NOON, NOON + 60}
    assert [info.id for info in here[0].client.experts()] == ["public"]
    store.close()
