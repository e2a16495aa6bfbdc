"""Taking a right away comes first: 200 streams that never cease hold up no revocation and no change of the policy."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import live_server
import pytest
from streams import Streams

pytestmark = [pytest.mark.engine, pytest.mark.slow]

SECONDS = 10.0
"""Each may take a step, what the streams' ends take, and a busy machine."""
BODY = {"messages": [{"role": "user", "content": "the fox"}], "max_tokens": 24, "ignore_eos": True}
PROJECT = "/v1/organization/projects/proj_press"


@pytest.fixture
def loaded(text_checkpoint: Path, tmp_path: Path) -> Iterator[Any]:
    """A server with 200 streams that begin anew whenever they end."""
    server = live_server.start(text_checkpoint, tmp_path)
    try:
        with Streams(server.url, server.key("all"), "/v1/chat/completions", BODY) as streams:
            deadline = time.monotonic() + 60
            while streams.statuses["200"] < 200:
                assert time.monotonic() < deadline, streams.statuses
                time.sleep(0.05)
            yield server
            assert set(streams.statuses) <= {"200", "403"}, streams.statuses
    finally:
        live_server.stop(server)


def test_experts_and_keys_are_revoked_and_permissions_taken_while_200_streams_run(loaded: Any) -> None:
    steps: list[tuple[str, str, Any]] = [
        ("POST", f"{PROJECT}/expert_permissions?wait=all", {"mode": "allow_list", "expert_ids": []}),
        ("POST", f"{PROJECT}/service_accounts", {"name": "robot"}),
        *(("DELETE", f"/v1/experts/{expert}", None) for expert in ("news", "math", "code", "secret")),
        ("POST", f"{PROJECT}/archive?wait=all", None),
    ]
    took = {}
    with loaded.client("admin") as http:
        for method, path, body in steps:
            began = time.monotonic()
            response = http.request(method, path, json=body)
            took[path] = time.monotonic() - began
            assert response.status_code == 200, (path, response.text, took)
    assert max(took.values()) < SECONDS, took
