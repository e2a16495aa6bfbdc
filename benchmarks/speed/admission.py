"""What flexgate adds to a request before the engine has it: the steps of `InferenceRequest`, and the seal."""

import asyncio
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from starlette.requests import Request
from tqdm import tqdm

from flexgate.policies.agreements import Agreement
from flexgate.policies.cache import DecisionCache
from flexgate.policies.documents import Expert, Quota, Role, Tenant
from flexgate.policies.ids import PUBLIC
from flexgate.policies.store.store import Store
from flexgate.server.engine.frontend.calls import ExpertSlotRef
from flexgate.server.engine.protocol.gates import new_seal_key, seal
from flexgate.server.engine.protocol.slots import SlotMap
from flexgate.server.http.auth import STATE, Context
from flexgate.server.http.body import Arriving
from flexgate.server.http.offload import Offload
from flexgate.server.inference.limits.budget_usage import BudgetUsage
from flexgate.server.inference.limits.limiter import REQUESTS, TOKENS, Limiter, LimitScope
from flexgate.server.inference.openai.chat import ENDPOINT
from flexgate.server.inference.pipeline import InferenceRequest
from flexgate.server.inference.request.limits import Limits
from flexgate.server.policy.decision_samples import DecisionSamples
from flexgate.server.policy.source import PolicySource
from speed.record import Run

TENANTS = 1000
LIMITS = {"requests_per_minute": 10**6, "tokens_per_minute": 10**9, "total_tokens": 10**12}
BUSY = (60, 6_000, 60_000)
"""Requests of one project in the last minute."""
EVERY = [PUBLIC, *(f"e{number}" for number in range(1, 32))]
BODY = json.dumps(
    {
        "model": "bench",
        "messages": [{"role": "user", "content": "When does the ferry leave? " * 20}],
        "max_tokens": 64,
        "temperature": 0.2,
        "flexgate": {"experts": {"only": ["e1", "e2", "e3"]}},
    }
).encode()


def run(asked: Run) -> None:
    """Time every piece of the path for one caller after another."""
    calls = asked.rounds or (200 if asked.quick else 20_000)
    shape = {"tenants": TENANTS, "experts": len(EVERY), "body_bytes": len(BODY)}
    with tempfile.TemporaryDirectory() as directory:
        store = _store(Path(directory))
        pieces = asyncio.run(_measure(store, calls))
        store.close()
    what = "microseconds per request, one after another; a tenant's decision is cached from its second request on"
    measured = {"what": what, "calls": calls, "pieces": pieces}
    asked.write("admission", measured, shape=shape)


async def _measure(store: Store, calls: int) -> dict[str, Any]:
    clock = _Clock()
    source = PolicySource(store, lambda: dict.fromkeys(EVERY, 1), lease_s=600.0, poll_s=1.0)
    usage = BudgetUsage(store)
    source.confirm()
    usage.refresh()
    services, key = _services(store, source, usage), new_seal_key()
    project = LimitScope("busy", "This project", Quota(**LIMITS))
    busy = {f"limits_after_{uses}_requests_a_minute": _busy(usage, project, uses) for uses in BUSY}
    for number in tqdm(range(calls), desc="admissions"):
        request = InferenceRequest(_request(f"sk-{number % TENANTS}"), services, ENDPOINT)
        clock.start()
        await request.authenticate()
        clock.lap("key")
        await request.read()
        await request.validate()
        clock.lap("body")
        await request.decide()
        clock.lap("decision")
        request.reserve()
        clock.lap("limits")
        seal(request.call.gate("request", key), key)
        clock.lap("seal")
        clock.stop("all")
        for name, other in busy.items():
            clock.skip()
            other.reserve([project], {REQUESTS: 1, TOKENS: 64}).commit({TOKENS: 64})
            clock.lap(name)
        request.reservation.commit({TOKENS: 64})
    return clock.report()


def _services(store: Store, source: PolicySource, usage: BudgetUsage) -> Any:
    """What a request works with, around a client without an engine."""
    refs = {expert: ExpertSlotRef(expert, slot, 1) for slot, expert in enumerate(EVERY)}
    return SimpleNamespace(
        policy=source,
        clock=time.time,
        arriving=Arriving(),
        offload=Offload(),
        body_bytes=1 << 20,
        body_seconds=30.0,
        limits=Limits(),
        model_names=("bench",),
        handlers=SimpleNamespace(has_chat_template=True),
        decisions=DecisionCache(),
        samples=DecisionSamples(store),
        limiter=Limiter(usage),
        client=SimpleNamespace(
            refs=refs,
            gates={},
            weights_epoch=1,
            slot_map=SlotMap.of_checkpoint([bytes(range(len(refs)))], len(refs), len(refs)),
        ),
        queue=SimpleNamespace(enter=lambda *_: None),
    )


def _request(key: str) -> Request:
    """As the server gets one, its body in one piece."""
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json", "content-length": str(len(BODY))}

    async def receive() -> Any:
        return {"type": "http.request", "body": BODY}

    scope = {"type": "http", "headers": [(name.encode(), value.encode()) for name, value in headers.items()]}
    return Request({**scope, STATE: Context("req_bench")}, receive)


def _busy(usage: BudgetUsage, project: LimitScope, uses: int) -> Limiter:
    """A limiter whose clock stands still after a minute in which the project made this many requests."""
    now = 0.0
    limiter = Limiter(usage, clock=lambda: now)
    for _ in range(uses):
        now += 59.0 / uses
        limiter.reserve([project], {REQUESTS: 1, TOKENS: 64}).commit({TOKENS: 64})
    return limiter


class _Clock:
    """Laps in nanoseconds, by name."""

    def __init__(self) -> None:
        self.laps: dict[str, list[int]] = {}

    def start(self) -> None:
        self.began = self.last = time.perf_counter_ns()

    def skip(self) -> None:
        self.last = time.perf_counter_ns()

    def lap(self, name: str) -> None:
        now = time.perf_counter_ns()
        self.laps.setdefault(name, []).append(now - self.last)
        self.last = time.perf_counter_ns()

    def stop(self, name: str) -> None:
        self.laps.setdefault(name, []).append(self.last - self.began)

    def report(self) -> dict[str, dict[str, float]]:
        return {
            name: {f"p{q}_us": round(float(np.percentile(values, q)) / 1000, 1) for q in (50, 99)}
            for name, values in self.laps.items()
        }


def _store(directory: Path) -> Store:
    """A real store: every expert is permitted to everyone, half of them with an end; every tenant has limits."""
    store = Store.open(f"sqlite:///{directory / 'policy.db'}")
    store.migrate()
    with store.change(actor="bench", at=time.time()) as change:
        _put_experts(change.put)
        for number in range(TENANTS):
            fields = {"id": f"t{number}", "name": "T", "mode": "allow_list", "expert_ids": EVERY[1:], "quota": LIMITS}
            tenant = Tenant.model_validate(fields)
            change.put(tenant)
            change.add_key(f"sk-{number}", prefix="sk", role=Role.TENANT, tenant_id=tenant.id)
    return store


def _put_experts(put: Callable[[Any], object]) -> None:
    for number, expert in enumerate(EVERY):
        put(Expert.model_validate({"id": expert, "owner": f"o{number}"}))
        if expert == PUBLIC:
            continue
        terms: dict[str, Any] = {"id": f"a{number}", "owner": f"o{number}", "experts": [expert]}
        terms |= {"assignee": "everyone", "effect": "permit"}
        if number % 2:
            terms["not_after"] = "2090-01-01T00:00:00Z"
        put(Agreement.model_validate(terms))
