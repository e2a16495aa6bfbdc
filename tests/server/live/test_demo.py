"""`flexgate serve --demo`: the shipped model, the demo keys, loopback names only."""

from __future__ import annotations

import os
import re
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
def state_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def demo(state_dir: Path) -> Iterator[str]:
    import socket

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    directory = state_dir
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


README = Path(__file__).parents[3] / "README.md"


def blocks(heading: str) -> list[tuple[str, str]]:
    """Language and text of each block under a heading of the README."""
    section = README.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"```(\w+)\n(.*?)```", section, re.DOTALL)


def commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """Each command of a console block, with the output that is shown below it."""
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        lines = part.splitlines()
        length = next(n for n, line in enumerate(lines) if not line.endswith("\\")) + 1
        yield "\n".join(lines[:length]), lines[length:]


def test_the_readmes_policy_section_runs_as_it_is_written(demo: str, state_dir: Path, tmp_path: Path) -> None:
    """Word for word, but for the port."""
    (tmp_path / ".venv").symlink_to(Path(sys.executable).parents[1])
    environment = {**os.environ, "FLEXGATE_STATE_DIR": str(state_dir), "PYTHONSAFEPATH": "1"}
    environment = {name: value for name, value in environment.items() if name != "FLEXGATE_DATABASE_URL"}
    ran = 0

    def run(*command: str) -> list[str]:
        command = tuple(part.replace("http://127.0.0.1:8000", demo) for part in command)
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        assert done.stderr == "", done.stderr
        return done.stdout.splitlines()

    for language, text in blocks("Setting a policy"):
        if language == "yaml":
            (tmp_path / "next.yaml").write_text(text)
        elif language == "python":
            expected = re.findall(r"^print\(.*\)  # (.*)$", text, re.MULTILINE)
            assert run(sys.executable, "-c", text) == expected
            ran += 1
        else:
            for command, expected in commands(text):
                assert run("bash", "-c", command) == expected, command
                ran += 1
    assert ran == 7
