"""What a decision costs, and what a snapshot of many tenants costs. Times are this process's own, the best of several.

`loop32_us` is the time of a bare loop over 32 integers on the same machine at the same moment, to
tell a slow machine from slow code.
"""

import hashlib
import resource
import time
import timeit
from collections.abc import Callable
from typing import Any

from flexgate.policies.agreements import Agreement
from flexgate.policies.cache import DecisionCache
from flexgate.policies.decide import decide
from flexgate.policies.decision import DecisionRequest
from flexgate.policies.documents import Expert, KeyRecord, Role, Tenant
from flexgate.policies.ids import TenantId
from flexgate.policies.incremental import Edit, revise
from flexgate.policies.snapshot import Snapshot
from flexgate.server.http.auth import authenticate
from speed.record import Run

EXPERTS = [Expert.model_validate({"id": "public" if n == 0 else f"e{n}", "owner": f"o{n}"}) for n in range(32)]
REQUEST = DecisionRequest(decision_id="d")
NOW = 1_800_000_000.0
WHAT = (
    "an uncached and a cached decision with reasons for every expert, half of the experts permitted, by agreements "
    "without and with an end; then the same with many tenants, of which every tenth has an agreement of its own"
)


def run(asked: Run) -> None:
    """Decisions, then snapshots of ever more tenants."""
    repeat, sizes = asked.rounds or (2 if asked.quick else 7), (10, 1_000) if asked.quick else (10, 1_000, 100_000)
    numbers = range(32)
    measured = {
        "what": WHAT,
        "loop32_us": _best_us(lambda: [n + 1 for n in numbers], 20_000, repeat),
        **_decisions(repeat),
        "tenants": {str(tenants): _at_scale(tenants, repeat) for tenants in sizes},
    }
    asked.write("decisions", measured, shape={"experts": len(EXPERTS)})


def terms(number: int, assignee: str, **fields: Any) -> Agreement:
    """One of many agreements, dealt out to the experts."""
    owner = 1 + number % 31
    named = {"id": f"a{number}", "owner": f"o{owner}", "experts": [f"e{owner}"]}
    return Agreement.model_validate({**named, "assignee": assignee, "effect": "permit", **fields})


def tenant(number: int) -> Tenant:
    """One of many tenants."""
    return Tenant.model_validate({"id": f"t{number}", "name": "T", "expert_ids": ["e1", "e2", "e3", "e4"]})


def key(number: int) -> KeyRecord:
    """Its key."""
    return KeyRecord(
        key_id=f"k{number}",
        sha256=hashlib.sha256(f"sk-{number}".encode()).digest(),
        prefix="sk",
        role=Role.TENANT,
        tenant_id=TenantId(f"t{number}"),
        created=0.0,
    )


def _snapshot_of(tenants: int, agreements: list[Agreement]) -> Snapshot:
    return Snapshot.build(
        policy_version=1,
        experts=EXPERTS,
        tenants=map(tenant, range(tenants)),
        agreements=agreements,
        keys=map(key, range(tenants)),
    )


def _decisions(repeat: int) -> dict[str, float]:
    costs = {}
    for label, fields in (("undated", {}), ("dated", {"not_after": "2030-01-01T00:00:00Z"})):
        snapshot = _snapshot_of(10, [terms(n, "everyone", **fields) for n in range(16)])
        costs |= {f"{name}_{label}_us": cost for name, cost in _costs(snapshot, "t1", repeat).items()}
    return costs


def _costs(snapshot: Snapshot, who: str, repeat: int) -> dict[str, float]:
    cache = DecisionCache()
    return {
        "decide": _best_us(lambda: decide(snapshot, who, REQUEST, NOW), 2_000, repeat),
        "cached": _best_us(lambda: cache.decide(snapshot, who, REQUEST, NOW), 20_000, repeat),
    }


def _at_scale(tenants: int, repeat: int) -> dict[str, float]:
    agreements = [terms(n, f"tenant:t{n * 10}") for n in range(tenants // 10)]
    memory, began = _peak_mb(), time.process_time()
    snapshot = _snapshot_of(tenants, agreements)
    seconds, grown = time.process_time() - began, _peak_mb() - memory
    other = Tenant(id=TenantId("t1"), name="Other")
    edit = Edit(other.id, tenant(1), other)
    return {
        "documents_and_snapshot_s": round(seconds, 2),
        "peak_growth_mb": round(grown, 1),
        "revise_one_tenant_ms": round(
            _best_us(lambda: revise(snapshot, policy_version=2, made=0.0, tenants=[edit]), 5, repeat) / 1000, 2
        ),
        **{f"{name}_us": cost for name, cost in _costs(snapshot, "t0", repeat).items()},
        "authenticate_us": _best_us(lambda: authenticate(snapshot, "Bearer sk-5", NOW), 20_000, repeat),
    }


def _best_us(work: Callable[[], object], number: int, repeat: int) -> float:
    rounds = timeit.repeat(work, timer=time.process_time, number=number, repeat=repeat)
    return round(min(rounds) / number * 1e6, 2)


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
