"""What recording costs: requests in and out of a ledger on this disk, streams whose tokens wait for their marks, and
copying the ledger to PostgreSQL."""

import asyncio
import gc
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
from postgreskit import running
from sqlalchemy import make_url
from tqdm import tqdm

from flexgate.policies.store.database import open_engine
from flexgate.server.ledger.entries import COMPLETED, RegisteredExpert, Registration, Used
from flexgate.server.ledger.journal import Journal
from flexgate.server.ledger.receipts.book import Book
from flexgate.server.ledger.receipts.maker import Maker
from flexgate.server.ledger.receipts.signing import KeyFile
from flexgate.server.ledger.shared import REQUESTS_AT_ONCE, Shared
from speed.record import Run

AT_ONCE, SLOTS = 64, 8
LEAST_REQUESTS, LEAST_COPIED, MOST_MICROSECONDS = 2000, 5000, 150
WHAT = (
    "a ledger on its own, synchronous=FULL, without an engine: requests that are registered, recorded once and ended, "
    "64 at once; then signed receipts of them all, and a copy of them in a PostgreSQL on the same machine that writes "
    "every commit to the disk; and 64 streams in which every token waits for its mark. CPU is that of all threads of "
    "the process, and its bound holds for a request with its receipt"
)
EXPERTS = tuple(
    RegisteredExpert(slot, f"expert-{slot}", f"owner-{slot}", f"a-{slot}", 1, "a" * 64) for slot in range(SLOTS)
)


def run(asked: Run) -> bool:
    """Measure both; returns whether the bounds hold."""
    requests, tokens = (500, 20) if asked.quick else (40_000, 400)
    gc.collect()
    gc.freeze()  # as a server does once it has started
    with tempfile.TemporaryDirectory() as directory:
        whole = asyncio.run(_timed(Path(directory) / "whole.db", requests, _request))
        receipts = _receipts(Path(directory), requests)
        copied = _copied(Path(directory) / "whole.db", requests)
        streams = asyncio.run(_timed(Path(directory) / "streams.db", AT_ONCE, lambda *one: _stream(*one, tokens)))
    rate, cpu = requests / whole["seconds"], whole["cpu_seconds"] / requests * 1e6
    marks = AT_ONCE * tokens
    receipt = receipts["cpu_seconds"] / requests * 1e6
    measured: dict[str, Any] = {
        "what": WHAT,
        "requests": requests,
        "requests_per_second": round(rate),
        "cpu_us_per_request": round(cpu, 1),
        "receipts_per_second": round(requests / receipts["seconds"]),
        "cpu_us_per_receipt": round(receipt, 1),
        "cpu_us_per_request_with_receipt": round(cpu + receipt, 1),
        "copied_to_postgresql": copied,
        "bound": {
            "requests_per_second": LEAST_REQUESTS,
            "cpu_us_per_request": MOST_MICROSECONDS,
            "copied_to_postgresql": LEAST_COPIED,
        },
        "streams": {
            "tokens_per_second": round(marks / streams["seconds"]),
            "cpu_us_per_token": round(streams["cpu_seconds"] / marks * 1e6, 1),
            "wait_ms": {f"p{q}": round(float(np.percentile(streams["waits"], q)) * 1e3, 2) for q in (50, 99)},
        },
    }
    asked.write("ledger", measured, shape={"slots": SLOTS})
    fast = copied["requests_per_second"] >= LEAST_COPIED
    return rate >= LEAST_REQUESTS and cpu + receipt <= MOST_MICROSECONDS and fast


def _receipts(directory: Path, requests: int) -> dict[str, float]:
    """Make the receipts of all requests, as a server does with a queue."""
    book = Book(directory / "receipts.db")
    maker = Maker(
        directory / "whole.db",
        book,
        KeyFile(directory / "receipts.pem"),
        clock=time.time,
        policy_digest=lambda _: "0" * 64,
        pseudonym=lambda owner, tenant: f"{owner}-{tenant}",
    )
    wall, cpu = time.perf_counter(), time.process_time()
    maker.work()
    made = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    if book.end().last != requests:
        raise RuntimeError(f"{book.end().last} receipts were made of {requests} requests: {maker.waiting}")
    maker.close()
    return made


async def _timed(
    path: Path, count: int, serve: Callable[[Journal, str, list[float]], Awaitable[None]]
) -> dict[str, Any]:
    journal, waits = Journal(path, clock=time.time), list[float]()
    names = iter(tqdm([f"dec_{number}" for number in range(count)], desc=path.stem))

    async def work() -> None:
        for name in names:
            await serve(journal, name, waits)

    wall, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(work() for _ in range(AT_ONCE)))
    journal.close()
    return {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu, "waits": waits}


def _copied(path: Path, requests: int) -> dict[str, int]:
    """How many requests a second PostgreSQL gets, their experts' parts included."""
    with running(durable=True) as server:
        url = make_url(server.new_database()).set(drivername="postgresql+psycopg")
        engine = open_engine(url.render_as_string(hide_password=False))
        copy, began, more = Shared(engine), time.perf_counter(), True
        while more:
            sequence, more = copy.copy(path)
        seconds = time.perf_counter() - began
        engine.dispose()
    if sequence < requests:
        raise RuntimeError(f"{sequence} of {requests} requests were copied")
    return {"requests_per_second": round(requests / seconds), "requests_at_once": REQUESTS_AT_ONCE}


async def _request(journal: Journal, name: str, _waits: list[float]) -> None:
    entry = journal.register(_registration(name))
    await entry.registered()
    await entry.cover(200, lambda: _used(100))
    entry.end(COMPLETED, _used(100))


async def _stream(journal: Journal, name: str, waits: list[float], tokens: int) -> None:
    entry = journal.register(_registration(name))
    for number in range(1, tokens + 1):
        began = time.perf_counter()
        await entry.cover(100 + number, lambda number=number: _used(number))  # type: ignore[misc]
        waits.append(time.perf_counter() - began)
    entry.end(COMPLETED, _used(tokens))


def _registration(name: str) -> Registration:
    return Registration(name, 1, "proj_bench", "key_bench", "/v1/chat/completions", "bench", 7, 3, EXPERTS)


def _used(tokens: int) -> Used:
    prompt, completion = [1 << 40] * SLOTS + [100] * SLOTS, [tokens << 32] * SLOTS + [tokens] * SLOTS
    return Used(100, 0, tokens, prompt, completion)
