"""How long after a change is committed another process enforces it, with many tenants in the database."""

import asyncio
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import Pipe, Process
from multiprocessing.connection import Connection as PipeEnd
from typing import Any

import numpy as np
from postgreskit import find, running
from sqlalchemy import insert
from tqdm import tqdm

from flexgate.policies.agreements import Document
from flexgate.policies.decide import decide
from flexgate.policies.decision import DecisionRequest
from flexgate.policies.snapshot import Snapshot
from flexgate.policies.store import Store, projects, schema
from flexgate.policies.store.change_notifications import ChangeNotifications
from flexgate.policies.store.documents import KINDS, to_json
from flexgate.server.policy.replicas import Replicas
from flexgate.server.policy.source import PolicySource
from speed.decisions import EXPERTS, key, tenant, terms
from speed.record import Run

LEASE_S, POLL_S, LOOK_EVERY_S = 2.0, 0.25, 0.002
WHAT = (
    "seconds from the commit of a change of one tenant's experts, made in one process, to the first decision by it in "
    "another process, which polls every 0.25 s and on PostgreSQL is notified (unless they are lost), and looks every "
    "2 ms; and what the change itself took"
)


def run(asked: Run) -> None:
    """Change, wait until it is enforced, change again: on both kinds of database."""
    tenants, changes = (100 if asked.quick else 100_000), asked.rounds or (5 if asked.quick else 100)
    measured: dict[str, Any] = {"what": WHAT, "changes": changes}
    with tempfile.TemporaryDirectory() as directory:
        measured["sqlite"] = _measure(
            f"sqlite:///{directory}/policy.db", tenants, changes, notifications=False, allowed=False
        )
    if find("postgres") is not None:
        with running() as server:
            url = server.new_database()
            measured["postgresql"] = _measure(url, tenants, changes, notifications=True, allowed=False)
            measured["postgresql_notifications_lost"] = _measure(
                url, tenants, changes, notifications=False, allowed=True
            )
    shape = {"tenants": tenants, "experts": len(EXPERTS), "agreements": tenants // 10, "keys": tenants}
    asked.write("enforcement", measured, shape=shape)


def _measure(url: str, tenants: int, changes: int, *, notifications: bool, allowed: bool) -> dict[str, Any]:
    store = Store.open(url)
    store.migrate()
    if store.version() == 0:
        _fill(store, tenants)
    with _other(url, notifications=notifications) as (other, started_s):
        waits, writes = [], []
        for number in tqdm(range(changes), desc=f"changes on {store.engine.dialect.name}"):
            who = f"t{number}"
            fields = {"expert_ids": ["e1", "e2", "e3", "e4"] if allowed else []}
            began = time.monotonic()
            projects.update_project(store, who, fields, actor="bench", at=time.time())
            committed = time.monotonic()
            other.send((who, store.version()))
            waits.append(other.recv() - committed)
            writes.append(committed - began)
    store.close()
    return {
        "start_seconds": round(started_s, 1),
        "enforced_seconds": _quantiles(waits),
        "write_seconds": _quantiles(writes),
    }


def _quantiles(values: list[float]) -> dict[str, float]:
    found = {f"p{q}": round(float(np.percentile(values, q)), 4) for q in (50, 99)}
    return {**found, "max": round(max(values), 4)}


def _fill(store: Store, tenants: int) -> None:
    """Rows as the store writes them, without checking each."""
    documents: list[Document] = [*EXPERTS, *map(tenant, range(tenants))]
    documents += [terms(n, f"tenant:t{n * 10}") for n in range(tenants // 10)]
    rows: dict[Any, list[dict[str, Any]]] = {}
    for position, document in enumerate(documents):
        values = to_json(document)
        rows.setdefault(KINDS[type(document)][1], []).append(
            {"id": values["id"], "position": position, "document": values}
        )
    records = [key(n) for n in range(tenants)]
    keys = [
        {
            "id": r.key_id,
            "sha256": r.sha256,
            "prefix": "sk",
            "role": r.role.value,
            "tenant_id": r.tenant_id,
            "created": 0.0,
        }
        for r in records
    ]
    with store.engine.begin() as connection:
        connection.execute(
            insert(schema.policy_revisions).values(version=1, at=time.time(), actor="bench", note="many tenants")
        )
        for table, found in rows.items():
            connection.execute(insert(table), found)
        connection.execute(insert(schema.api_keys), keys)


@contextmanager
def _other(url: str, *, notifications: bool) -> Iterator[tuple[PipeEnd, float]]:
    """Another process that follows the store."""
    here, there = Pipe()
    process = Process(target=_follow, args=(url, notifications, there), daemon=True)
    began = time.monotonic()
    process.start()
    here.recv()
    try:
        yield here, time.monotonic() - began
    finally:
        here.send(None)
        process.join(30)


def _follow(url: str, notifications: bool, pipe: PipeEnd) -> None:
    asyncio.run(_answer(url, notifications, pipe))


async def _answer(url: str, notifications: bool, pipe: PipeEnd) -> None:
    """Say for each (tenant, version) when a decision about the tenant was first made from that version."""
    store = Store.open(url)
    policy = PolicySource(
        store,
        lambda: dict.fromkeys((expert.id for expert in EXPERTS), 1),
        lease_s=LEASE_S,
        poll_s=POLL_S,
        replicas=Replicas(store.engine, lease_s=LEASE_S),
        notifications=ChangeNotifications(store.engine) if notifications else None,
    )
    policy.confirm()
    polling = asyncio.create_task(policy.run())
    pipe.send("ready")
    while (asked := await asyncio.to_thread(pipe.recv)) is not None:
        pipe.send(await _enforced(policy, *asked))
    polling.cancel()
    policy.deregister()
    store.close()


async def _enforced(policy: PolicySource, who: str, version: int) -> float:
    while True:
        snapshot: Snapshot = await policy.current()
        decision = decide(snapshot, who, DecisionRequest(decision_id="d"), time.time())
        if decision.policy_version >= version:
            return time.monotonic()
        await asyncio.sleep(LOOK_EVERY_S)
