"""A server's policy from the test's own database, and a start up to where the engine would be started."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from policy_file import LIVE, refusal, run
from typer.testing import Result

from flexgate.policies.documents import Role, Tenant
from flexgate.policies.errors import ChangeRefused
from flexgate.policies.store import Store
from flexgate.server.lifecycle import bootstrap
from flexgate.server.policy.source import PolicySource


@pytest.fixture
def services(services: Any, real_store: Store) -> Any:
    services.policy = PolicySource(real_store, lambda: LIVE, lease_s=60, poll_s=0.01)
    services.policy.confirm()
    return services


@pytest.fixture
def serve(text_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """`flexgate serve` on a database of the test's own, up to where the engine would be started."""

    def engine_started(*_: object, **__: object) -> None:
        raise ChangeRefused("the engine would be started now")

    monkeypatch.setattr(bootstrap, "launch", engine_started)
    monkeypatch.setattr("flexgate.server.http.logs.configure", lambda *_: None)
    usual = (str(text_checkpoint), "--port=0", f"--state-dir={tmp_path / 'state'}")
    return lambda *options: run("serve", *usual, *options)


@pytest.fixture
def database(serve: Callable[..., Result], tmp_path: Path) -> Path:
    """What a first start makes, with a tenant in it."""
    assert refusal(serve()).endswith("the engine would be started now")
    path = tmp_path / "state" / "flexgate.db"
    store = Store.open(f"sqlite:///{path}")
    with store.change(actor="test", at=time.time()) as change:
        change.put(Tenant(id="acme", name="Acme"))
        change.mint_key(Role.ADMIN)
    store.close()
    return path
