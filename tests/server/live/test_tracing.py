"""A served request's span has the id, the reasons to finish and the experts of its response, at a real collector."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from collector import Collector, collecting
from demo_server import serve_demo

pytestmark = [pytest.mark.engine, pytest.mark.slow]

MESSAGES = [{"role": "user", "content": "Which Tarnholm citizen painted Norbrin Library?"}]
ASKED: list[tuple[str, dict[str, Any], list[str]]] = [
    ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 24}, ["stop"]),
    ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 2, "stream": True}, ["length"]),
    ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 2, "n": 2}, ["length", "length"]),
    ("/v1/completions", {"prompt": ["Hello", "Goodbye"], "max_tokens": 3}, ["length", "length"]),
    ("/v1/completions", {"prompt": "Hello", "max_tokens": 9, "stop": ["e", "a", "o", "i"], "stream": True}, ["stop"]),
    ("/v1/responses", {"input": "Hello", "max_output_tokens": 2}, ["length"]),
    ("/v1/responses", {"input": "Hello", "max_output_tokens": 2, "stream": True}, ["length"]),
]


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
        assert f"traces    {collector.url}/v1/traces" in (place / "log").read_text()


def payload(response: httpx.Response) -> dict[str, Any]:
    """The body, or of a stream the chunk that has the `flexgate` object."""
    if not response.headers["content-type"].startswith("text/event-stream"):
        found: dict[str, Any] = response.json()
        return found
    chunks = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
    chunks = [chunk.get("response", chunk) for chunk in chunks]
    return next(chunk for chunk in chunks if "flexgate" in chunk)


def test_each_response_has_its_span_at_the_collector(traced: str, collector: Collector) -> None:
    sent = []
    with httpx.Client(base_url=traced, headers={"authorization": "Bearer sk-demo-press"}, timeout=60) as http:
        for path, body, _ in ASKED:
            response = http.post(path, json={"model": "flexgate-demo", "temperature": 0, **body})
            assert response.status_code == 200, response.text
            sent.append(payload(response))
    spans = collector.await_spans(6 * len(ASKED))
    outer = {span.attributes.get("gen_ai.response.id"): span for span in spans if span.kind == 2}
    assert len(outer) == len(ASKED)
    for (path, _, reasons), answer in zip(ASKED, sent, strict=True):
        span = outer[answer["id"]]
        said, about = span.attributes, answer["flexgate"]
        assert said["gen_ai.response.finish_reasons"] == reasons, path
        assert said["flexgate.decision_id"] == about["decision_id"]
        parts = about["attribution"]["experts"]
        assert sorted(said["flexgate.experts.used"]) == sorted(part["id"] for part in parts if part["tokens"])
        assert said["flexgate.experts.excluded.not_in_allow_list"] == 3
        usage = answer.get("usage")
        if usage:
            counted = said["gen_ai.usage.input_tokens"] + said["gen_ai.usage.output_tokens"]
            assert counted == usage["total_tokens"], path
        assert [inner.name for inner in spans if inner.parent == span.id] == [
            "authenticate",
            "read",
            "validate",
            "decide",
            "reserve",
        ]
    assert all(b"Tarnholm" not in body and b"Torvik" not in body for body in collector.bodies)
    with httpx.Client(base_url=traced, headers={"authorization": "Bearer sk-demo-admin"}) as http:
        assert f'flexgate_spans_total{{outcome="sent"}} {6.0 * len(ASKED)}' in http.get("/metrics").text
