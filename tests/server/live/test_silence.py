"""A canary in the prompt is nowhere but in the answer's own echo."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

pytestmark = pytest.mark.engine

CANARY = "xylophone-quagga-7731"
MESSAGES = [{"role": "user", "content": CANARY}]
TOOL = {"type": "function", "function": {"name": CANARY, "parameters": {"type": "object"}}}
BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 2}),
    ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 2, "stream": True}),
    ("/v1/chat/completions", {"messages": MESSAGES, "temperature": CANARY}),
    ("/v1/chat/completions", {"messages": MESSAGES, CANARY: 1}),
    ("/v1/chat/completions", {"messages": MESSAGES, "model": CANARY}),
    ("/v1/chat/completions", {"messages": [{"role": CANARY, "content": CANARY}]}),
    ("/v1/chat/completions", {"messages": MESSAGES, "tools": [TOOL], "tool_choice": "auto"}),
    ("/v1/chat/completions", {"messages": MESSAGES, "stop": [CANARY], "max_tokens": 1}),
    ("/v1/completions", {"prompt": CANARY, "max_tokens": 2, "echo": True, "logprobs": 1}),
    ("/v1/completions", {"prompt": CANARY * 500}),
    ("/v1/completions", {"prompt": CANARY, "bad_words": [CANARY], "max_tokens": 1}),
    ("/v1/completions", {"prompt": CANARY, "structured_outputs": {"regex": f"({CANARY}"}}),
    ("/v1/completions", {"prompt": CANARY, "structured_outputs": {"grammar": CANARY}}),
    ("/v1/completions", {"prompt": CANARY, "cache_salt": CANARY, "max_tokens": 1}),
    ("/v1/completions", {"prompt": CANARY, "flexgate": {"purpose": CANARY}}),
    ("/v1/completions", {"prompt": CANARY, "flexgate": {"experts": {"only": [CANARY]}}}),
    ("/v1/responses", {"input": CANARY, "instructions": CANARY, "max_output_tokens": 2}),
    ("/v1/responses", {"input": CANARY, "max_output_tokens": 2, "stream": True}),
    ("/tokenize", {"prompt": CANARY}),
    (f"/{CANARY}", {"prompt": CANARY}),
    (f"/v1/completions?{CANARY}", {"prompt": CANARY, "max_tokens": 1}),
]


def test_no_log_metric_or_database_has_a_word_of_a_prompt(server: Any) -> None:
    statuses = []
    with server.client() as http:
        for path, body in BODIES:
            statuses.append(http.post(path, json=body, headers={"x-note": CANARY}).status_code)
        http.post("/v1/completions", content=CANARY, headers={"content-type": "application/json"})
        http.get("/v1/models", headers={"authorization": f"Bearer {CANARY}"})
    assert {200, 400, 404} <= set(statuses)
    assert 500 not in statuses
    with server.client("auditor") as http:
        assert CANARY not in http.get("/metrics").text
    files = itertools.chain([server.log], server.database.parent.glob("flexgate.db*"))
    for path in files:
        assert CANARY.encode() not in path.read_bytes(), path
