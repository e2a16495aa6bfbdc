"""OpenTelemetry spans of requests, made and sent by a thread of their own.

A request that is over is put into a bounded queue as plain values. Only the thread makes spans of it and waits for the
collector: one that is slow or gone costs requests nothing. Once the queue is full, spans are dropped and counted. What
is sampled, sent and how is read from the `OTEL_*` variables by OpenTelemetry's own library.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Final, Self

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
    from opentelemetry.sdk.trace.export import SpanExporter

MOST_QUEUED: Final = 2_048
"""Requests that wait to be sent."""
AT_ONCE: Final = 128
"""Requests whose spans are sent together."""
EVERY_S: Final = 1.0
CLOSE_S: Final = 5.0
"""How long the end of the server waits for the collector."""
ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS: Final = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_PROTOCOL: Final = "http/protobuf"
_PATH: Final = "/v1/traces"
_LIBRARY: Final = "opentelemetry.exporter.otlp.proto.http.trace_exporter"

Value = str | int | float | bool | Sequence[str]
logger = logging.getLogger(__name__)


class TracingRefused(Exception):
    """The variables ask for something that this server does not send."""


@dataclass(frozen=True, slots=True)
class Step:
    """A part of a request, in nanoseconds of Unix time."""

    name: str
    began: int
    ended: int


@dataclass(frozen=True, slots=True)
class Traced:
    """A request that is over, in nanoseconds of Unix time.

    Attributes:
        attributes: what is said of it; no text of prompts or responses.
        error: the code of a server's fault.
        carrier: the headers that name the trace which it belongs to.
    """

    name: str
    began: int
    ended: int
    attributes: Mapping[str, Value]
    error: str | None
    steps: Sequence[Step]
    carrier: Mapping[str, str]


class Tracing:
    """Sends spans; `start` begins, `close` sends what waits."""

    def __init__(
        self,
        exporter: SpanExporter,
        endpoint: str,
        *,
        count: Callable[[str, int], None],
        most_queued: int = MOST_QUEUED,
    ) -> None:
        """Prepare to send.

        Args:
            endpoint: where the exporter sends them.
            count: told how many spans were `sent`, `failed` (the collector did not take them) or `dropped`.
            most_queued: requests that may wait.
        """
        from opentelemetry.sdk.trace import TracerProvider

        self.endpoint = endpoint
        self._exporter = exporter
        self._count = count
        self._most_queued = most_queued
        self._queue: deque[Traced] = deque()
        self._wake = threading.Event()
        self._closing = self._over = False
        self._failing = False
        self._ended: list[ReadableSpan] = []
        self._reason = _Reason.of(_LIBRARY)
        self._provider = TracerProvider(resource=_resource(), shutdown_on_exit=False)
        self._provider.add_span_processor(_collecting(self._ended))
        self._tracer = self._provider.get_tracer("flexgate", version("flexgate"))
        self._thread = threading.Thread(target=self._run, name="flexgate-tracing", daemon=True)

    def start(self) -> None:
        """Begin to send."""
        self._thread.start()

    def add(self, traced: Traced) -> None:
        """Send a request's spans some time, or drop all of them if too many wait. Never blocks."""
        if len(self._queue) >= self._most_queued:
            self._count("dropped", 1 + len(traced.steps))
            return
        self._queue.append(traced)
        if len(self._queue) >= AT_ONCE:
            self._wake.set()

    def close(self) -> None:
        """Send what waits, for as long as `CLOSE_S` allows. Blocks."""
        self._closing = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(CLOSE_S)
        self._over = True
        self._exporter.shutdown()
        if left := sum(1 + len(traced.steps) for traced in self._queue):
            self._count("dropped", left)
            logger.error("%d spans were not sent", left)

    def _run(self) -> None:
        closing = False
        while not closing:
            self._wake.wait(EVERY_S)
            self._wake.clear()
            closing = self._closing
            while self._queue and not self._over:
                self._send([self._queue.popleft() for _ in range(min(AT_ONCE, len(self._queue)))])

    def _send(self, requests: Sequence[Traced]) -> None:
        from opentelemetry.sdk.trace.export import SpanExportResult

        self._ended.clear()
        for traced in requests:
            try:
                self._span(traced)
            except Exception as error:
                self._count("failed", 1 + len(traced.steps))
                logger.error("spans of a request could not be made", exc_info=error)
        try:
            taken = not self._ended or self._exporter.export(tuple(self._ended)) is SpanExportResult.SUCCESS
        except Exception as error:  # nothing may end this thread
            self._reason.message, taken = repr(error), False
        self._count("sent" if taken else "failed", len(self._ended))  # those that are sampled
        if taken and self._failing:
            logger.warning("spans are sent again")
        elif not taken and not self._failing:
            logger.error("spans are not sent, and requests do not wait for them: %s", self._reason.message)
        self._failing = not taken

    def _span(self, traced: Traced) -> None:
        from opentelemetry.propagate import extract
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        span = self._tracer.start_span(
            traced.name,
            extract(traced.carrier),
            SpanKind.SERVER,
            attributes=traced.attributes,
            start_time=traced.began,
        )
        inside = set_span_in_context(span)
        for step in traced.steps:
            self._tracer.start_span(step.name, inside, start_time=step.began).end(step.ended)
        if traced.error is not None:
            span.set_status(Status(StatusCode.ERROR))
        span.end(traced.ended)


def endpoint_of(option: str | None) -> str | None:
    """Where spans are sent to: the option's collector, or that of the `OTEL_*` variables; None for nowhere.

    Raises:
        TracingRefused: the variables ask for another exporter or protocol.
    """
    asked = option or next((os.environ[name] for name in ENDPOINTS if os.environ.get(name)), None)
    exporter = os.environ.get("OTEL_TRACES_EXPORTER") or "otlp"
    if asked is None or os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or exporter == "none":
        return None
    if exporter != "otlp":
        raise TracingRefused(f"OTEL_TRACES_EXPORTER is {exporter!r}: set it to otlp, or to none")
    protocol = next((os.environ[name] for name in _PROTOCOLS if os.environ.get(name)), _PROTOCOL)
    if protocol != _PROTOCOL:
        raise TracingRefused(f"spans are sent by {_PROTOCOL}, not by {protocol!r}: set {_PROTOCOLS[0]}, or unset it")
    base = asked.rstrip("/")
    whole = option is None and bool(os.environ.get(ENDPOINTS[0]))  # this variable names the path as well
    return asked if whole or base.endswith(_PATH) else base + _PATH


def tracing_to(endpoint: str, count: Callable[[str, int], None]) -> Tracing:
    """What sends spans to an OTLP collector over HTTP."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise TracingRefused(
            f"spans cannot be sent, because '{error.name}' is missing: install flexgate with its extra 'tracing'"
        ) from error
    return Tracing(OTLPSpanExporter(endpoint), endpoint, count=count)


class _Reason(logging.Handler):
    """The last thing that the library logged, instead of a line of it for each batch."""

    message = "the collector does not take them"

    @classmethod
    def of(cls, name: str) -> Self:
        """What a logger says from now on."""
        reason, source = cls(), logging.getLogger(name)
        source.handlers, source.propagate = [reason], False
        return reason

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the message."""
        self.message = record.getMessage()


def _resource() -> Resource:
    from opentelemetry.sdk.resources import Resource

    named = os.environ.get("OTEL_SERVICE_NAME") or "service.name=" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    return Resource.create({} if named else {"service.name": "flexgate"})


def _collecting(ended: list[ReadableSpan]) -> SpanProcessor:
    """A processor that keeps sampled spans until they are sent."""
    from opentelemetry.sdk.trace import SpanProcessor

    class Collecting(SpanProcessor):
        def on_end(self, span: ReadableSpan) -> None:
            ended.append(span)

    return Collecting()
