"""`flexgate serve --demo`: the shipped model, the demo keys, loopback names only."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.engine

ALLOWED = {
    "sk-demo-all": ["public", "news", "math", "code", "legal"],
    "sk-demo-press": ["public", "news"],
    "sk-demo-public": ["public"],
}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    import socket

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    directory = tmp_path_factory.mktemp("demo")
    command = [str(Path(sys.executable).with_name("flexgate")), "serve", "--demo"]
    command += [f"--port={port}", "--enforce-eager", f"--state-dir={directory}"]
    command += ["--kv-cache-memory-bytes=134217728"]
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}/ready").status_code == 200:
                break
        except httpx.TransportError:
            time.sleep(0.2)
    yield url
    process.terminate()
    assert process.wait(60) == 0, (directory / "log").read_text()[-2000:]


def ask(url: str, key: str, question: str, **headers: str) -> httpx.Response:
    body = {"model": "flexgate-demo", "temperature": 0, "max_tokens": 24}
    return httpx.post(
        f"{url}/v1/chat/completions",
        json={**body, "messages": [{"role": "user", "content": question}]},
        headers={"authorization": f"Bearer {key}", **headers},
        timeout=60,
    )


@pytest.mark.parametrize("key", ALLOWED)
def test_each_demo_key_has_its_gate(demo: str, key: str) -> None:
    answer: dict[str, Any] = ask(demo, key, "What is the opposite of old?").json()
    assert answer["flexgate"]["allowed"] == ALLOWED[key]
    assert {"owner": "tarnholm-gazette", "id": "news"}.items() <= answer["flexgate"]["attribution"]["experts"][
        1
    ].items()


def test_the_admin_key_cannot_infer(demo: str) -> None:
    assert ask(demo, "sk-demo-admin", "hello").status_code == 403


def test_another_host_name_is_refused(demo: str) -> None:
    refused = ask(demo, "sk-demo-all", "hello", host="rebound.test")
    assert refused.json()["error"]["code"] == "wrong_host"
