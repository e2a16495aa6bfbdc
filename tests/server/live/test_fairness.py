"""A tenant is answered while another one has more streams open than the batch has places."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack
from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.engine

STREAMS = 64
BODY = {"model": "tiny", "prompt": "the fox", "max_tokens": 900, "ignore_eos": True, "stream": True}


class Streams:
    """Streams of one tenant, each read by a thread of its own until they are left."""

    def __init__(self, server: Any, count: int) -> None:
        self.begun = 0
        self.refused: list[str] = []
        self._lock = threading.Lock()
        self._left = threading.Event()
        self._server = server
        self._threads = [threading.Thread(target=self._read) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def _read(self) -> None:
        with self._server.client("all") as http, http.stream("POST", "/v1/completions", json=BODY) as stream:
            if stream.status_code != 200:
                self.refused.append(stream.read().decode())
                return
            for number, line in enumerate(stream.iter_lines()):
                with self._lock:
                    self.begun += number == 0 and line.startswith("data: ")
                if self._left.is_set():
                    return

    def leave(self) -> None:
        """Disconnect all of them."""
        self._left.set()
        for thread in self._threads:
            thread.join(60)


def figures(server: Any) -> dict[str, float]:
    with server.client("auditor") as http:
        lines = http.get("/metrics").text.splitlines()
    values = (line.rpartition(" ") for line in lines if line.startswith(("flexgate_waiting", "flexgate_free")))
    return {name: float(value) for name, _, value in values}


def until(server: Any, expected: dict[str, float]) -> None:
    deadline = time.monotonic() + 60
    while (found := figures(server)) | expected != found:
        assert time.monotonic() < deadline, found
        time.sleep(0.01)


def test_one_request_is_answered_while_streams_of_another_tenant_wait(server: Any) -> None:
    until(server, {"flexgate_free_seats": 64.0})
    with ExitStack() as stack:
        streams = Streams(server, STREAMS)
        stack.callback(streams.leave)
        until(server, {"flexgate_free_seats": 32.0, "flexgate_waiting_projects": 1.0})
        with server.client("press") as http:
            answer = http.post("/v1/completions", json={**BODY, "max_tokens": 1, "stream": False})
        after = figures(server)
        assert answer.status_code == 200, answer.text
        assert after["flexgate_waiting_prompts"] > 0, "all streams ran, so that nothing is shown"
        assert streams.refused == []
    until(server, {"flexgate_free_seats": 64.0, "flexgate_waiting_prompts": 0.0, "flexgate_waiting_projects": 0.0})


def test_tenants_cannot_read_how_many_others_wait(server: Any) -> None:
    with server.client("all") as http:
        assert http.get("/metrics").status_code in (403, 404)
    with server.client("auditor") as http:
        text = http.get("/metrics").text
    queue = [line for line in text.splitlines() if line.startswith(("flexgate_waiting", "flexgate_queue"))]
    assert queue
    assert "proj_" not in "".join(queue)


def test_a_prompt_may_have_no_more_choices_than_the_server_says(server: Any) -> None:
    with server.client("all") as http:
        response: httpx.Response = http.post("/v1/completions", json={"prompt": "x", "n": 9})
    assert response.status_code == 400
