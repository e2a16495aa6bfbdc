"""What a statement over a million requests costs: seconds and memory of a process that makes it and nothing else."""

import multiprocessing
import os
import sqlite3
import tempfile
import time
from collections.abc import Collection, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from flexgate.policies.agreements import Agreement
from flexgate.server.admin.statements.schemas import statement_of
from flexgate.server.ledger.journal import Journal
from flexgate.server.ledger.receipts.batches import MOST
from flexgate.server.ledger.receipts.book import Batch, Book
from flexgate.server.ledger.receipts.maker import Maker
from flexgate.server.ledger.receipts.service import Receipts
from flexgate.server.ledger.receipts.signing import KeyFile, thumbprint
from flexgate.server.ledger.receipts.statements import Statements
from flexgate.server.ledger.statements import Period, owner_uses
from flexgate.server.ledger.terms import Terms, Version
from speed.record import Run

REQUESTS, QUICK = 1_000_000, 2_000
PROOFS = 20
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
    "and under 10 versions of agreements; then the same, signed, with a root over its receipts; then paths for some of "
    "them, the first of which makes the tree again; the ledger was written before, and is not in the process's memory"
)


def run(asked: Run) -> bool:
    """Write a ledger and make the statement of the owner with the most uses; returns whether the bounds hold."""
    requests = QUICK if asked.quick else REQUESTS
    with tempfile.TemporaryDirectory() as directory:
        path = _written(Path(directory) / "ledger.db", requests)
        _receipts(Path(directory), requests)
        size = path.stat().st_size
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            found = process.submit(_measured, path).result()
    bound = {
        "statement_seconds": MOST_SECONDS,
        "signed_seconds": MOST_SECONDS,
        "first_proof_seconds": MOST_SECONDS,
        "peak_mb": MOST_MB,
    }
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
        connection.executemany("INSERT INTO experts VALUES (?, ?, ?, ?, ?, NULL, NULL)", _experts())
        connection.executemany("INSERT INTO counts VALUES (?, ?, ?, 900, ?, 100, 250000)", _counts(requests))
    return path


def _experts() -> Iterator[tuple[Any, ...]]:
    """Each expert under each version of its agreement."""
    for expert in range(EXPERTS):
        for version in range(AGREEMENTS):
            number = expert * AGREEMENTS + version
            yield number, f"expert-{expert}", f"owner-{expert}", f"agreement-{expert}", 1 + version


def _counts(requests: int) -> Iterator[tuple[int, ...]]:
    for number in range(requests):
        for expert in range(EXPERTS):
            yield number + 1, expert * AGREEMENTS + number % AGREEMENTS, 900 << 36, 100 << 36


def _receipts(directory: Path, requests: int) -> None:
    """A file of receipts with roots for all requests; what they are roots of is not read."""
    key = KeyFile(directory / "receipts.pem")
    key.make()
    with closing(Book(directory / "receipts.db")) as book:
        book.add_key(thumbprint(key.public_key()), key.public_key())
        for number, first in enumerate(range(1, requests + 1, MOST), start=1):
            sequences = range(first, min(first + MOST, requests + 1))
            roots = [os.urandom(32) for _ in sequences]
            book.append(Batch(number, first, sequences, roots, b"{}", b""))


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
    shown, shown_cpu = time.perf_counter(), time.process_time()
    statements, signed = _signed(path)
    after = time.perf_counter()
    proofs = [_proved(path, statements=None), *(_proved(path, statements=statements) for _ in range(PROOFS))]
    return {
        "statement_seconds": round(shown - began, 2),
        "cpu_seconds": round(shown_cpu - cpu, 2),
        "signed_seconds": round(after - shown, 2),
        "first_proof_seconds": round(proofs[0], 2),
        "next_proof_ms": round(sum(proofs[1:]) / PROOFS * 1e3, 1),
        "receipts_signed": int(signed["statement"]["receipts"]),
        "peak_mb": _peak_mb(),
        "requests_in_statement": made.requests,
        "statement_kb": round(len(text) / 1000, 1),
    }


def _statements(path: Path) -> Statements:
    """As a server has them that has just started."""
    maker = SimpleNamespace(signer=KeyFile(path.with_name("receipts.pem")), waiting=None)
    receipts = Receipts(path, path.with_name("receipts.db"), cast(Maker, maker), lambda _, tenant: tenant)
    return Statements(receipts)


def _signed(path: Path) -> tuple[Statements, dict[str, Any]]:
    """The same, signed, with the root over the owner's receipts."""
    assert PERIOD is not None

    def terms_of(counted: Collection[Terms]) -> dict[Version, Agreement]:
        return {terms.version: _terms(*terms.version) for terms in counted}

    statements = _statements(path)
    return statements, statements.sign(OWNER, PERIOD, terms_of, at=float(PERIOD.end), ended=True)


def _proved(path: Path, *, statements: Statements | None) -> float:
    """Seconds for the path of one receipt; without `statements`, on a server that has just started."""
    assert PERIOD is not None
    began = time.perf_counter()
    (statements or _statements(path)).prove(OWNER, PERIOD, f"dec_{QUICK // 2:032x}", last=None)
    return time.perf_counter() - began


def _peak_mb() -> int:
    """The most that this program held; `getrusage` would also count what the process held before it ran it."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return round(int(line.split()[1]) / 1024)


def _terms(agreement: str, version: int) -> Agreement:
    duty = {"kind": "compensate", "rate": "0.02", "currency": "EUR", "unit": "thousand_share_weighted_tokens"}
    fields = {"id": agreement, "version": version, "owner": OWNER, "experts": ["expert-0"], "assignee": "everyone"}
    return Agreement.model_validate({**fields, "effect": "permit", "duties": [duty]})
