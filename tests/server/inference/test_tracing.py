"""OpenTelemetry spans of requests: what they say, what they never say, and that no request waits for a collector."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import pytest
from collector import Collector, collecting
from generating import PATH, Generating, refuse
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from flexgate.server.http import tracing as module
from flexgate.server.http.tracing import ENDPOINTS, Step, Traced, Tracing, TracingRefused, endpoint_of, tracing_to
from flexgate.server.inference.tracing import MOST_CARRIED

STEPS = ["authenticate", "read", "validate", "decide", "reserve"]
CANARY = "xylophone-quagga-7731"
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)


class Traces:
    """What was sent, in memory; `spans` ends it."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._exporter = InMemorySpanExporter()
        self.tracing = Tracing(self._exporter, "memory", count=self.count)
        self.tracing.start()

    def count(self, outcome: str, spans: int) -> None:
        self.counts[outcome] += spans

    def spans(self) -> tuple[ReadableSpan, ...]:
        self.tracing.close()
        return self._exporter.get_finished_spans()

    def request(self) -> tuple[ReadableSpan, list[ReadableSpan]]:
        """The span of the one request, and those of its steps."""
        spans = self.spans()
        (outer,) = [span for span in spans if span.kind is SpanKind.SERVER]
        return outer, [span for span in spans if span is not outer]


@pytest.fixture
def traces(services: Any) -> Iterator[Traces]:
    made = Traces()
    services.tracing = made.tracing
    yield made
    made.tracing.close()


@pytest.mark.asyncio
@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
async def test_a_request_is_one_span_with_one_for_each_step(
    client: httpx.AsyncClient, generating: Any, traces: Traces, streamed: bool
) -> None:
    generating(Generating(3, streamed=streamed))
    body = {"prompt": "x", "stream": streamed, "max_tokens": 7, "temperature": 0.5}
    response = await client.post(PATH, json=body)
    assert response.status_code == 200
    outer, steps = traces.request()
    said = dict(outer.attributes or {})
    assert outer.name == "text_completion tiny"
    wanted = {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "flexgate",
        "gen_ai.request.model": "tiny",
        "gen_ai.request.max_tokens": 7,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.stream": streamed,
        "gen_ai.response.id": "cmpl-" + response.headers["x-request-id"].removeprefix("req_"),
        "gen_ai.response.model": "tiny",
        "gen_ai.usage.input_tokens": 5,
        "gen_ai.usage.output_tokens": 3,
        "gen_ai.usage.cache_read.input_tokens": 2,
        "http.response.status_code": 200,
        "flexgate.project": "t",
        "flexgate.policy_version": 7,
        "flexgate.weights_epoch": 3,
        "flexgate.experts.allowed": 2,
        "flexgate.experts.used": ("public", "news"),
        "flexgate.experts.excluded.not_in_allow_list": 1,
    }
    assert {name: said.get(name) for name in wanted} == wanted
    assert said["flexgate.decision_id"] in response.text
    assert outer.status.status_code is StatusCode.UNSET
    assert [step.name for step in steps] == STEPS
    assert {step.parent and step.parent.span_id for step in steps} == {outer.context and outer.context.span_id}
    times = [time for step in steps for time in (step.start_time or 0, step.end_time or 0)]
    assert [outer.start_time, *times, outer.end_time] == sorted([outer.start_time or 0, *times, outer.end_time or 0])
    assert traces.counts == {"sent": 6}


@pytest.mark.asyncio
async def test_a_span_says_why_an_expert_was_denied_and_names_no_hidden_one(
    client: httpx.AsyncClient, traces: Traces
) -> None:
    for name in ("math", "secret"):
        await client.post(PATH, json={"prompt": CANARY, "flexgate": {"experts": {"only": [name]}}})
    spans = traces.spans()
    first, second = [dict(span.attributes or {}) for span in spans if span.kind is SpanKind.SERVER]
    assert (first["flexgate.code"], first["http.response.status_code"]) == ("expert_policy_denied", 403)
    assert first["flexgate.experts.denied.not_in_allow_list"] == 1
    assert second["http.response.status_code"] == 404
    assert [span.name for span in spans if span.kind is not SpanKind.SERVER] == STEPS[:4] * 2
    assert "secret" not in repr([(span.name, span.attributes) for span in spans])


@pytest.mark.asyncio
async def test_no_span_has_a_word_of_a_body(client: httpx.AsyncClient, generating: Any, traces: Traces) -> None:
    generating(Generating(1))
    bodies: list[dict[str, Any]] = [
        {"prompt": CANARY},
        {"prompt": "x", "model": CANARY},
        {"prompt": "x", CANARY: 1},
        *({"prompt": "x", field: CANARY} for field in ("temperature", "top_p", "top_k", "n", "stream", "max_tokens")),
        {"prompt": "x", "user": CANARY, "cache_salt": CANARY, "flexgate": {"purpose": CANARY}},
        {"prompt": "x", "n": 10**400},
    ]
    for body in bodies:
        await client.post(f"{PATH}?{CANARY}", json=body, headers={"x-note": CANARY, "tracestate": f"a={CANARY}"})
    spans = traces.spans()
    assert len([span for span in spans if span.kind is SpanKind.SERVER]) == len(bodies)
    assert CANARY not in repr([span.to_json() for span in spans])


@pytest.mark.asyncio
async def test_a_caller_without_a_key_takes_no_place_of_others(
    client: httpx.AsyncClient, generating: Any, traces: Traces
) -> None:
    generating(Generating(1))
    for key in (CANARY, "sk-revoked"):
        refused = await client.post(PATH, json={"prompt": "x"}, headers={"authorization": f"Bearer {key}"})
        assert refused.status_code == 401
    assert traces.spans() == ()


@pytest.mark.asyncio
async def test_a_response_that_broke_off_is_an_error_and_a_refusal_is_none(
    client: httpx.AsyncClient, generating: Any, services: Any, traces: Traces, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(services.ledger, monkeypatch, after=2)
    generating(Generating(3, streamed=True))
    await client.post(PATH, json={"prompt": "x", "stream": True})
    await client.post(PATH, json={"prompt": "x", "nonsense": 1})
    broken, refused = [span for span in traces.spans() if span.kind is SpanKind.SERVER]
    assert broken.status.status_code is StatusCode.ERROR
    assert dict(broken.attributes or {})["error.type"] == "ledger_unavailable"
    assert refused.status.status_code is StatusCode.UNSET
    assert dict(refused.attributes or {})["flexgate.code"] == "unknown_parameter"


@pytest.mark.asyncio
async def test_a_span_belongs_to_the_trace_that_a_client_names(
    client: httpx.AsyncClient, generating: Any, traces: Traces
) -> None:
    generating(Generating(1))
    for header in (f"00-{TRACE}-{PARENT}-01", "nonsense", f"00-{TRACE}-{PARENT}-01" + " " * MOST_CARRIED):
        await client.post(PATH, json={"prompt": "x"}, headers={"traceparent": header})
    await client.post(PATH, json={"prompt": "x"}, headers={"traceparent": f"00-{TRACE}-{PARENT}-00"})
    named, *others = [span for span in traces.spans() if span.kind is SpanKind.SERVER]
    assert named.context is not None
    assert (f"{named.context.trace_id:032x}", named.parent and f"{named.parent.span_id:016x}") == (TRACE, PARENT)
    assert [span.parent for span in others] == [None, None]  # the last one is not sampled by who called
    assert traces.counts == {"sent": 18}


def traced(name: str = "chat tiny", steps: int = 0) -> Traced:
    return Traced(name, 1, 9, {}, None, [Step("read", 2, 3)] * steps, {})


class Hanging(SpanExporter):
    """A collector that takes what it was sent once it is told to."""

    def __init__(self) -> None:
        self.asked, self.go = threading.Event(), threading.Event()
        self.names: list[str] = []

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.asked.set()
        assert self.go.wait(60)
        self.names += [span.name for span in spans]
        return SpanExportResult.SUCCESS


def test_spans_that_find_no_place_are_dropped_whole_and_counted_and_nothing_waits() -> None:
    counts, exporter = Counter[str](), Hanging()
    tracing = Tracing(exporter, "hanging", count=lambda outcome, spans: counts.update({outcome: spans}), most_queued=3)
    tracing.start()
    tracing.add(traced("first"))
    assert exporter.asked.wait(60)
    for number in range(5):
        tracing.add(traced(f"{number}", steps=2))
    assert counts == {"dropped": 6}
    exporter.go.set()
    tracing.close()
    assert counts == {"dropped": 6, "sent": 10}
    assert exporter.names == ["first", *(name for number in range(3) for name in ("read", "read", f"{number}"))]


def test_the_end_of_a_server_does_not_wait_for_a_collector_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CLOSE_S", 0.05)
    counts, exporter = Counter[str](), Hanging()
    tracing = Tracing(exporter, "hanging", count=lambda outcome, spans: counts.update({outcome: spans}))
    tracing.start()
    tracing.add(traced())
    assert exporter.asked.wait(60)
    tracing.add(traced(steps=1))
    tracing.close()
    assert counts == {"dropped": 2}
    exporter.go.set()


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting() as made:
        yield made


def test_a_collector_gets_spans_over_http_and_after_an_outage_again(
    collector: Collector, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=test")
    endpoint, counts = endpoint_of(collector.url), Counter[str]()
    told = threading.Event()

    def count(outcome: str, spans: int) -> None:
        counts[outcome] += spans
        told.set()

    assert endpoint == f"{collector.url}/v1/traces"
    tracing = tracing_to(endpoint, count)
    collector.status = 400  # for good: nothing is tried again
    tracing.start()
    with caplog.at_level(logging.WARNING, "flexgate"):
        for status in (400, 400, 200):
            collector.status = status
            told.clear()
            tracing.add(traced(f"chat {status}", steps=1))
            assert told.wait(60)
        tracing.close()
    assert counts == {"failed": 4, "sent": 2}
    assert [span.name for span in collector.spans] == ["read", "chat 200"]
    inner, outer = collector.spans
    assert (inner.parent, inner.trace, inner.began, inner.ended) == (outer.id, outer.trace, 2, 3)
    assert (outer.kind, outer.began, outer.ended, outer.error) == (2, 1, 9, False)
    assert collector.resource["service.name"] == "flexgate"
    assert collector.resource["deployment.environment"] == "test"
    failed, again = [record.getMessage() for record in caplog.records]
    assert failed.startswith("spans are not sent, and requests do not wait for them: ")
    assert "400" in failed
    assert again == "spans are sent again"


@pytest.mark.asyncio
async def test_requests_are_answered_while_a_collector_hangs(
    client: httpx.AsyncClient, generating: Any, services: Any, collector: Collector
) -> None:
    collector.go.clear()
    services.tracing = tracing_to(f"{collector.url}/v1/traces", lambda *_: None)
    services.tracing.start()
    generating(Generating(1))
    async with asyncio.timeout(30):
        for _ in range(3):
            assert (await client.post(PATH, json={"prompt": "x"})).status_code == 200
    collector.go.set()
    services.tracing.close()
    assert Counter(span.name for span in collector.spans)["text_completion tiny"] == 3


@pytest.mark.parametrize(
    ("variables", "option", "endpoint"),
    [
        ({}, None, None),
        ({}, "http://a:4318/", "http://a:4318/v1/traces"),
        ({}, "http://a:4318/v1/traces", "http://a:4318/v1/traces"),
        ({ENDPOINTS[1]: "http://b"}, None, "http://b/v1/traces"),
        ({ENDPOINTS[0]: "http://c/x", ENDPOINTS[1]: "http://b"}, None, "http://c/x"),
        ({ENDPOINTS[0]: "http://c/x"}, "http://a", "http://a/v1/traces"),
        ({ENDPOINTS[1]: "http://b", "OTEL_SDK_DISABLED": "true"}, None, None),
        ({ENDPOINTS[1]: "http://b", "OTEL_TRACES_EXPORTER": "none"}, "http://a", None),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, "http://a", "http://a/v1/traces"),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, None, None),
    ],
)
def test_spans_go_where_the_option_or_the_variables_say(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], option: str | None, endpoint: str | None
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert endpoint_of(option) == endpoint


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc", "spans are sent by http/protobuf, not by 'grpc'"),
        ("OTEL_TRACES_EXPORTER", "zipkin", "OTEL_TRACES_EXPORTER is 'zipkin'"),
    ],
)
def test_what_is_not_sent_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(TracingRefused, match=message):
        endpoint_of("http://a")


def test_vllms_processes_send_no_spans_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    import os
    from types import SimpleNamespace

    from flexgate.server.engine.frontend.launch import prepare_environment
    from flexgate.server.engine.protocol.gates import new_seal_key

    monkeypatch.setattr(os, "environ", {ENDPOINTS[0]: "http://c"})
    settings: Any = SimpleNamespace(enforce_eager=True)
    prepare_environment(new_seal_key(), settings)
    assert ENDPOINTS[0] not in os.environ
