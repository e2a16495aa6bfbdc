"""Prometheus metrics: what this server counts, next to what vLLM counts. No text, no key.

Usage by expert and project: `flexgate.server.http.usage_metrics`.
"""

from __future__ import annotations

from typing import Final

from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, Counter, Gauge, Histogram, generate_latest

from flexgate.server.ledger.entries import State

CONTENT_TYPE: Final = CONTENT_TYPE_LATEST

_READY: Final = Gauge("flexgate_ready", "Whether /ready returns 200.", registry=REGISTRY)
_REQUESTS: Final = Counter("flexgate_requests", "Answered requests.", ["route", "status"], registry=REGISTRY)
_REFUSALS: Final = Counter("flexgate_refusals", "Refused requests by error code.", ["code"], registry=REGISTRY)
_POLICY_VERSION: Final = Gauge("flexgate_policy_version", "Version of the policy in use.", registry=REGISTRY)
_WEIGHTS_EPOCH: Final = Gauge("flexgate_weights_epoch", "Epoch of the experts being served.", registry=REGISTRY)
_WAITING: Final = Gauge("flexgate_waiting_prompts", "Prompts waiting for the engine.", registry=REGISTRY)
_PROJECTS: Final = Gauge("flexgate_waiting_projects", "Projects whose prompts wait for the engine.", registry=REGISTRY)
_FREE: Final = Gauge("flexgate_free_seats", "Free places in the engine's batch.", registry=REGISTRY)
_LEDGER_FAILING: Final = Gauge("flexgate_ledger_failing", "Whether the ledger cannot be written.", registry=REGISTRY)
_RUNNING: Final = Gauge("flexgate_ledger_running", "Requests in the ledger that have not ended.", registry=REGISTRY)
_UNWRITTEN: Final = Gauge("flexgate_ledger_unwritten", "Ends of requests that are not on disk.", registry=REGISTRY)
_BEHIND: Final = Gauge(
    "flexgate_ledger_clock_behind_seconds",
    "How far the clock is behind the ledger's newest end or closed month.",
    registry=REGISTRY,
)
_LAPSED: Final = Gauge(
    "flexgate_budget_servers_lapsed", "Other servers whose reservations of budgets count no more.", registry=REGISTRY
)
_BUDGETS_UNWRITTEN: Final = Gauge(
    "flexgate_budgets_unwritten",
    "Whether requests with a budget are refused, because the database did not exchange it for a minute.",
    registry=REGISTRY,
)
_UNCOPIED: Final = Gauge(
    "flexgate_ledger_uncopied", "Recorded requests that a copy does not have yet.", ["copy"], registry=REGISTRY
)
_EVENTS: Final = Counter(
    "flexgate_usage_events",
    "Usage events that a sink took (sent) or will never take (refused).",
    ["outcome"],
    registry=REGISTRY,
)
_SPANS: Final = Counter(
    "flexgate_spans",
    "Spans that a collector took (sent), did not take (failed), or that found no place to wait (dropped).",
    ["outcome"],
    registry=REGISTRY,
)
QUEUE_SECONDS: Final = Histogram(
    "flexgate_queue_seconds",
    "How long a prompt waited for the engine.",
    buckets=(0.001, 0.01, 0.1, 0.5, 1, 5, 10, 30, 60, 120, 300),
    registry=REGISTRY,
)


def count_response(route: str, status: int) -> None:
    """Count one response; `route` is a route's template, never a client's path."""
    _REQUESTS.labels(route=route, status=str(status)).inc()


def count_refusal(code: str | None) -> None:
    """Count one error response."""
    _REFUSALS.labels(code=code or "none").inc()


def ready(is_ready: bool) -> None:
    """Note whether a request would be served."""
    _READY.set(is_ready)


def epochs(policy_version: int, weights_epoch: int) -> None:
    """Note which policy and weights are in use."""
    _POLICY_VERSION.set(policy_version)
    _WEIGHTS_EPOCH.set(weights_epoch)


def queue(waiting: int, projects: int, free: int) -> None:
    """Note how many prompts of how many projects wait, and how many places are free for them."""
    _WAITING.set(waiting)
    _PROJECTS.set(projects)
    _FREE.set(free)


def ledger(state: State) -> None:
    """Note how the ledger stands."""
    _LEDGER_FAILING.set(state.failing)
    _RUNNING.set(state.running)
    _UNWRITTEN.set(state.unwritten)
    _BEHIND.set(state.behind_seconds)
    for name, requests in state.uncopied.items():
        _UNCOPIED.labels(copy=name).set(requests)


def budgets(servers_lapsed: int, unwritable: bool) -> None:
    """Note how many servers have not renewed what they reserved, and whether use cannot be written."""
    _LAPSED.set(servers_lapsed)
    _BUDGETS_UNWRITTEN.set(unwritable)


def count_events(outcome: str, events: int) -> None:
    """Count usage events that were sent or refused."""
    _EVENTS.labels(outcome=outcome).inc(events)


def count_spans(outcome: str, spans: int) -> None:
    """Count spans that were sent, failed or dropped."""
    _SPANS.labels(outcome=outcome).inc(spans)


def render() -> bytes:
    """Everything in Prometheus' text format. Takes a while for many names: call it in a thread."""
    return generate_latest(REGISTRY)
