"""Requests of different tenants at the same moment: each has its own gate and nobody else's."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

pytestmark = pytest.mark.engine

ALLOWED = {
    "all": ["public", "news", "math", "code", "secret"],
    "press": ["public", "news"],
    "public": ["public"],
    "free": ["public", "news", "math", "code"],
}


def ask(server: Any, number: int) -> tuple[str, dict[str, Any], dict[str, str]]:
    who = list(ALLOWED)[number % len(ALLOWED)]
    stream = number % 3 == 0
    path, body = (
        ("/v1/completions", {"prompt": ["the fox"] * (1 + number % 3), "n": 1 + number % 2}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "the dog"}]}),
        ("/v1/responses", {"input": "the news"}),
    )[number // 4 % 3]
    size = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
    with server.client(who) as http:
        response = http.post(path, json={**body, size: 4 + number % 5, "stream": stream})
    assert response.status_code == 200, response.text
    if not stream:
        return who, response.json()["flexgate"], dict(response.headers)
    events = [line[6:] for line in response.text.splitlines() if line.startswith("data: {")]
    payloads = [json.loads(event) for event in events]
    found = [p.get("flexgate") or p.get("response", {}).get("flexgate") for p in payloads]
    (only,) = [item for item in found if item]
    return who, only, dict(response.headers)


def test_every_answer_is_under_its_own_tenants_gate(server: Any) -> None:
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda number: ask(server, number), range(48)))
    for who, gate, headers in answers:
        assert gate["allowed"] == ALLOWED[who]
        assert headers["x-flexgate-experts"] == ",".join(ALLOWED[who])
        for expert in gate["attribution"]["experts"]:
            assert expert["id"] in ALLOWED[who] or expert["tokens"] == expert["gate_mass"] == 0
    decisions = {gate["decision_id"] for _, gate, _ in answers}
    requests = {headers["x-request-id"] for _, _, headers in answers}
    assert len(decisions) == len(requests) == len(answers)
