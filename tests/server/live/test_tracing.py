"""A served request's span has the id, the reasons to finish and the experts of its response, at a real collector."""

from __future__ import annotations

import json
import re
import secrets
import sys
from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path
from typing import Any

import httpx
import pytest
from collector import Collector, collecting
from demo_server import serve_demo

pytestmark = [pytest.mark.engine, pytest.mark.slow]

MESSAGES = [{"role": "user", "content": "Which Tarnholm citizen painted Norbrin Library?"}]
ASKED: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 24}),
    ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 2, "stream": True}),
    ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 2, "n": 2}),
    ("/v1/completions", {"prompt": ["Hello", "Goodbye"], "max_tokens": 3}),
    ("/v1/completions", {"prompt": "Hello", "max_tokens": 9, "stop": ["e", "a", "o", "i"], "stream": True}),
    ("/v1/responses", {"input": "Hello", "max_output_tokens": 2}),
    ("/v1/responses", {"input": "Hello", "max_output_tokens": 2, "stream": True}),
]


CALLER = "00f067aa0ba902b7"
"""The span of the client that calls."""


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with collecting() as made:
        yield made


@pytest.fixture(scope="module")
def traced(collector: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A demo that sends its spans; its address."""
    place = tmp_path_factory.mktemp("traced")
    flexgate = Path(sys.executable).with_name("flexgate")
    options = ("--enforce-eager", "--kv-cache-memory-bytes=134217728", f"--otlp-endpoint={collector.url}")
    with serve_demo(place, *options, flexgate=flexgate) as url:
        yield url
        assert re.search(rf"traces +{collector.url}/v1/traces\n", (place / "log").read_text())


def payloads(response: httpx.Response) -> list[dict[str, Any]]:
    """The body, or the chunks of a stream; of the events of a response, the responses in them."""
    if not response.headers["content-type"].startswith("text/event-stream"):
        return [response.json()]
    chunks = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
    return [chunk.get("response", chunk) for chunk in chunks]


def reasons_of(said: list[dict[str, Any]]) -> list[str]:
    """Why each choice was finished, as the response says it."""
    if said[-1].get("object") == "response":
        return ["length" if said[-1]["status"] == "incomplete" else "stop"]
    choices = [choice for one in said for choice in one["choices"] if choice.get("finish_reason")]
    return [choice["finish_reason"] for choice in sorted(choices, key=itemgetter("index"))]


def test_each_response_has_its_span_at_the_collector(traced: str, collector: Collector) -> None:
    sent, traces = [], [secrets.token_hex(16) for _ in ASKED]
    before = len(collector.spans)
    with httpx.Client(base_url=traced, headers={"authorization": "Bearer sk-demo-press"}, timeout=60) as http:
        for (path, body), trace in zip(ASKED, traces, strict=True):
            client = {"traceparent": f"00-{trace}-{CALLER}-01"}
            response = http.post(path, json={"model": "flexgate-demo", "temperature": 0, **body}, headers=client)
            assert response.status_code == 200, response.text
            sent.append(payloads(response))
    spans = collector.await_spans(before + 6 * len(ASKED))[before:]
    outer = {span.attributes.get("gen_ai.response.id"): span for span in spans if span.kind == 2}
    assert len(outer) == len(ASKED)
    for (path, _), trace, answers in zip(ASKED, traces, sent, strict=True):
        answer = next(one for one in answers if "flexgate" in one)
        span = outer[answer["id"]]
        assert (span.trace, span.parent) == (trace, CALLER)
        said, about = span.attributes, answer["flexgate"]
        assert said["gen_ai.response.finish_reasons"] == reasons_of(answers) != [], path
        assert said["flexgate.decision_id"] == about["decision_id"]
        parts = about["attribution"]["experts"]
        assert sorted(said["flexgate.experts.used"]) == sorted(part["id"] for part in parts if part["tokens"])
        assert said["flexgate.experts.excluded.not_in_allow_list"] == 3
        usage = answer.get("usage")
        if usage:
            counted = said["gen_ai.usage.input_tokens"] + said["gen_ai.usage.output_tokens"]
            assert counted == usage["total_tokens"], path
        steps = [inner for inner in spans if inner.parent == span.id]
        assert [step.name for step in steps] == ["authenticate", "read", "validate", "decide", "reserve"]
        assert {step.trace for step in steps} == {span.trace}
        times = [time for step in steps for time in (step.began, step.ended)]
        assert [span.began, *times, span.ended] == sorted([span.began, *times, span.ended])
    assert len(spans) == 6 * len(ASKED)  # none of the engine's
    assert all(b"Tarnholm" not in body and b"Torvik" not in body for body in collector.bodies)
    with httpx.Client(base_url=traced, headers={"authorization": "Bearer sk-demo-admin"}) as http:
        assert f'flexgate_spans_total{{outcome="sent"}} {float(before + len(spans))}' in http.get("/metrics").text
