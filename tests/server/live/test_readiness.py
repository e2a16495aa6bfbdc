"""A server whose engine core hangs says so, and is ready again once it answers."""

from __future__ import annotations

import signal
import time
from typing import Any

import httpx
import live_server
import pytest

from flexgate.server.engine.frontend.watchdog import READY_SECONDS, TICK_SECONDS

pytestmark = [pytest.mark.engine, pytest.mark.slow]

SLACK_SECONDS = 30.0  # of a busy machine; what is tested is that it ends


def seconds_until(url: str, status: int) -> float:
    began = time.monotonic()
    while httpx.get(f"{url}/ready", timeout=60).status_code != status:
        assert time.monotonic() - began < READY_SECONDS + TICK_SECONDS + SLACK_SECONDS
        time.sleep(0.05)
    return time.monotonic() - began


def test_a_server_is_ready_while_its_engine_core_answers(server: Any) -> None:
    (core,) = (p for p in live_server.family(server) if "EngineCore" in " ".join((p.name(), *p.cmdline())))
    assert httpx.get(f"{server.url}/ready").status_code == 200
    core.send_signal(signal.SIGSTOP)
    try:
        seconds_until(server.url, 503)
        assert httpx.get(f"{server.url}/health").status_code == 200
    finally:
        core.send_signal(signal.SIGCONT)
    seconds_until(server.url, 200)
    with server.client() as http:
        assert http.post("/v1/completions", json={"prompt": "the", "max_tokens": 1}).status_code == 200
