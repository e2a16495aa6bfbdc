"""Cost of decisions: `python tests/policies/bench.py`. Prints JSON; times are the best of several.

`loop32_us` is the time of a bare loop over 32 integers on the same machine at the same moment, to
tell a slow machine from slow code.
"""

from __future__ import annotations

import hashlib
import json
import platform
import resource
import sys
import time
import timeit
from collections.abc import Callable
from typing import Any

from flexgate.policies.cache import DecisionCache
from flexgate.policies.decide import decide
from flexgate.policies.decision import DecisionRequest
from flexgate.policies.snapshot import Snapshot
from flexgate.policies.tenants import Expert, KeyRecord, Role, Tenant
from flexgate.policies.terms import Agreement
from flexgate.server.auth import authenticate

EXPERTS = [Expert.model_validate({"id": "public" if n == 0 else f"e{n}", "owner": f"o{n}"}) for n in range(32)]
REQUEST = DecisionRequest(decision_id="d")
NOW = 1_800_000_000.0


def best_us(work: Callable[[], object], number: int) -> float:
    """The best of seven rounds, in microseconds of this process's own time per call."""
    rounds = timeit.repeat(work, timer=time.process_time, number=number, repeat=7)
    return round(min(rounds) / number * 1e6, 2)


def terms(number: int, assignee: str, **fields: Any) -> Agreement:
    owner = 1 + number % 31
    return Agreement.model_validate(
        {
            "id": f"a{number}",
            "owner": f"o{owner}",
            "experts": [f"e{owner}"],
            "assignee": assignee,
            "effect": "permit",
            **fields,
        }
    )


def snapshot_of(tenants: int, agreements: list[Agreement]) -> Snapshot:
    named = ["e1", "e2", "e3", "e4"]
    return Snapshot.build(
        policy_version=1,
        experts=EXPERTS,
        tenants=[Tenant.model_validate({"id": f"t{n}", "name": "T", "expert_ids": named}) for n in range(tenants)],
        agreements=agreements,
        keys=[
            KeyRecord(
                key_id=f"k{n}",
                sha256=hashlib.sha256(f"sk-{n}".encode()).digest(),
                prefix="sk",
                role=Role.TENANT,
                tenant_id=f"t{n}",
                created=0.0,
            )
            for n in range(tenants)
        ],
    )


def decisions() -> dict[str, float]:
    """Half of the experts permitted, by agreements without and with an end."""
    costs = {}
    for label, fields in (("undated", {}), ("dated", {"not_after": "2030-01-01T00:00:00Z"})):
        snapshot = snapshot_of(10, [terms(n, "everyone", **fields) for n in range(16)])
        costs[f"decide_{label}_us"] = best_us(lambda s=snapshot: decide(s, "t1", REQUEST, NOW), 2000)
        cache = DecisionCache()
        costs[f"cached_{label}_us"] = best_us(lambda s=snapshot, c=cache: c.decide(s, "t1", REQUEST, NOW), 20_000)
    return costs


def at_scale(tenants: int) -> dict[str, float]:
    """One agreement for every tenth tenant."""
    agreements = [terms(n, f"tenant:t{n * 10}") for n in range(tenants // 10)]
    memory, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    snapshot = snapshot_of(tenants, agreements)
    seconds = time.process_time() - started
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    cache, header = DecisionCache(), "Bearer sk-5"
    return {
        "documents_and_snapshot_s": round(seconds, 2),
        "peak_growth_mb": round(grown / 1024, 1),
        "decide_us": best_us(lambda: decide(snapshot, "t0", REQUEST, NOW), 2000),
        "cached_us": best_us(lambda: cache.decide(snapshot, "t0", REQUEST, NOW), 20_000),
        "authenticate_us": best_us(lambda: authenticate(snapshot, header, NOW), 20_000),
    }


def main() -> None:
    numbers = range(32)
    result = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "experts": len(EXPERTS),
        "loop32_us": best_us(lambda: [n + 1 for n in numbers], 20_000),
        **decisions(),
        "tenants": {str(tenants): at_scale(tenants) for tenants in (10, 1_000, 100_000)},
    }
    json.dump(result, sys.stdout, indent=2)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
