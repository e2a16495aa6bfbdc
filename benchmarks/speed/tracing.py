"""What OpenTelemetry spans cost a request: its five steps and its end, with and without them, in turns.

The spans are made and encoded as for a collector, by their thread, while requests go on; nothing is sent.
"""

import asyncio
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from tqdm import tqdm

from flexgate.policies.store.store import Store
from flexgate.server.http.auth import context_of
from flexgate.server.http.tracing import Tracing
from flexgate.server.inference.limits.budget_usage import BudgetUsage
from flexgate.server.inference.limits.limiter import TOKENS
from flexgate.server.inference.openai.chat import ENDPOINT
from flexgate.server.inference.pipeline import InferenceRequest
from flexgate.server.inference.tracing import TracedRequest
from flexgate.server.policy.source import PolicySource
from speed.admission import BODY, EVERY, TENANTS, _request, _services, _store
from speed.record import Run
from speed.statistics import paired

ROUND = 500
"""Requests of each kind in a round, which gives one ratio of medians."""


class Encoding(SpanExporter):
    """Makes the bytes that a collector would get."""

    def __init__(self) -> None:
        self.bytes = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.bytes += len(encode_spans(spans).SerializePartialToString())
        return SpanExportResult.SUCCESS


def run(asked: Run) -> None:
    """Time requests with and without spans, in turns."""
    rounds = asked.rounds or (2 if asked.quick else 40)
    with tempfile.TemporaryDirectory() as directory:
        store = _store(Path(directory))
        measured = asyncio.run(_measure(store, rounds))
        store.close()
    what = "microseconds of the event loop per request: the five steps, and its end; ratio with spans to without"
    asked.write("tracing", {"what": what, **measured}, shape={"tenants": TENANTS, "body_bytes": len(BODY)})


async def _measure(store: Store, rounds: int) -> dict[str, Any]:
    source = PolicySource(store, lambda: dict.fromkeys(EVERY, 1), lease_s=600.0, poll_s=1.0)
    usage = BudgetUsage(store)
    source.confirm()
    usage.refresh()
    counts: dict[str, int] = {}
    tracing = Tracing(Encoding(), "nowhere", count=lambda outcome, spans: _add(counts, outcome, spans))
    tracing.start()
    services = _services(store, source, usage)
    times: dict[bool, list[list[int]]] = {False: [], True: []}
    for _ in tqdm(range(rounds), desc="rounds"):
        laps: dict[bool, list[int]] = {False: [], True: []}
        for number in range(2 * ROUND):
            traced = number % 2 == 1
            laps[traced].append(await _one(services, tracing if traced else None, number))
        for traced, found in laps.items():
            times[traced].append(found)
    tracing.close()
    medians = {traced: [float(np.median(one)) for one in found] for traced, found in times.items()}
    return {
        "off_p50_us": round(float(np.median(times[False])) / 1000, 1),
        "on_p50_us": round(float(np.median(times[True])) / 1000, 1),
        "ratio": paired([medians[True]], [medians[False]]).report(),
        "spans": counts,
    }


async def _one(services: Any, tracing: Tracing | None, number: int) -> int:
    """Nanoseconds of one request, whose commit is not timed."""
    http = _request(f"sk-{number % TENANTS}")
    http.scope["path"] = "/v1/chat/completions"
    began = time.perf_counter_ns()
    request = (
        InferenceRequest(http, services, ENDPOINT)
        if tracing is None
        else TracedRequest(http, services, ENDPOINT, tracing)
    )
    await request.prepare()
    over = context_of(http).over
    if over is not None:
        over(200)
    spent = time.perf_counter_ns() - began
    request.reservation.commit({TOKENS: 64})
    return spent


def _add(counts: dict[str, int], outcome: str, spans: int) -> None:
    counts[outcome] = counts.get(outcome, 0) + spans
