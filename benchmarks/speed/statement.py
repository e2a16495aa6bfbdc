"""What a statement over a million requests costs: seconds and memory of a process that makes it and nothing else."""

import multiprocessing
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

from flexgate.policies.agreements import Agreement
from flexgate.server.admin.statements.schemas import statement_of
from flexgate.server.ledger.entries import Part
from flexgate.server.ledger.journal import INSERT_PART, Journal
from flexgate.server.ledger.statements import Period, owner_uses
from speed.record import Run

REQUESTS, QUICK = 1_000_000, 2_000
MOST_SECONDS, MOST_MB = 30, 500
PERIOD = Period.of("2026-11")
OWNER, TENANTS, AGREEMENTS, EXPERTS = "owner-0", 100, 10, 4
INSERT = (
    "INSERT INTO usage (sequence, request, registered_at, ended_at, outcome, tenant, key_id, endpoint, model, "
    "policy_version, weights_epoch, prompt_tokens, cached_tokens, completion_tokens) "
    "VALUES (?, ?, ?, ?, 'completed', ?, 'key', '/v1/chat/completions', 'bench', 7, 3, 900, 0, 100)"
)
WHAT = (
    "a statement of a month in which one owner had a part in every request, with three other experts, for 100 projects "
    "and under 10 versions of agreements; the ledger was written before, and is not in the process's memory"
)


def run(asked: Run) -> bool:
    """Write a ledger and make the statement of the owner with the most uses; returns whether the bounds hold."""
    requests = QUICK if asked.quick else REQUESTS
    with tempfile.TemporaryDirectory() as directory:
        path = _written(Path(directory) / "ledger.db", requests)
        size = path.stat().st_size
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            found = process.submit(_measured, path).result()
    bound = {"statement_seconds": MOST_SECONDS, "peak_mb": MOST_MB}
    measured = {"what": WHAT, "requests": requests, "ledger_mb": round(size / 1e6), **found, "bound": bound}
    asked.write("statement", measured, shape={"experts": EXPERTS})
    return found["requests_in_statement"] == requests and all(found[name] <= most for name, most in bound.items())


def _written(path: Path, requests: int) -> Path:
    Journal(path, clock=time.time).close()
    assert PERIOD is not None
    step = (PERIOD.end - PERIOD.start) * 1_000_000 // requests
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("PRAGMA synchronous = OFF")
        ended = (PERIOD.start * 1_000_000 + number * step for number in range(requests))
        rows = ((n + 1, f"dec_{n:032x}", at, at, f"project-{n % TENANTS}") for n, at in enumerate(ended))
        connection.executemany(INSERT, rows)
        connection.executemany(INSERT_PART, _parts(requests))
    return path


def _parts(requests: int) -> Iterator[tuple[Any, ...]]:
    for number in range(requests):
        for expert in range(EXPERTS):
            part = Part(
                expert=f"expert-{expert}",
                owner=f"owner-{expert}",
                prompt_mass=900 << 36,
                prompt_positions=900,
                completion_mass=100 << 36,
                completion_positions=100,
                agreement=f"agreement-{expert}",
                agreement_version=1 + number % AGREEMENTS,
                package=None,
                share_ppm=250_000,
                duties_sha256=None,
            )
            yield number + 1, *part


def _measured(path: Path) -> dict[str, Any]:
    assert PERIOD is not None
    began, cpu = time.perf_counter(), time.process_time()
    found = owner_uses(path, OWNER, PERIOD)
    account = found.account({terms.version: _terms(*terms.version) for terms in found.counted_under})
    made = statement_of(
        PERIOD,
        OWNER,
        account,
        now=float(PERIOD.end),
        is_open=False,
        name_of=lambda tenant: f"anon-{tenant}",
        denials={},
        changes=[],
    )
    text = made.model_dump_json()
    return {
        "statement_seconds": round(time.perf_counter() - began, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2),
        "peak_mb": _peak_mb(),
        "requests_in_statement": made.requests,
        "statement_kb": round(len(text) / 1000, 1),
    }


def _peak_mb() -> int:
    """The most that this program held; `getrusage` would also count what the process held before it ran it."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return round(int(line.split()[1]) / 1024)


def _terms(agreement: str, version: int) -> Agreement:
    duty = {"kind": "compensate", "rate": "0.02", "currency": "EUR", "unit": "thousand_share_weighted_tokens"}
    fields = {"id": agreement, "version": version, "owner": OWNER, "experts": ["expert-0"], "assignee": "everyone"}
    return Agreement.model_validate({**fields, "effect": "permit", "duties": [duty]})
