"""Real clients against the running demo, in an environment of their own: `make test-clients`.

Each module is one client, and each of its tests one path: `test_conversation`, `test_tools`, `test_stream`,
`test_structured`, `test_refusal`. `FLEXGATE_CLIENTS_URL` names a demo that is running already; `--record FILE` writes
what came of it, from which `table.py` makes `docs/clients.md`.
"""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODEL = "flexgate-demo"
START_SECONDS = 300
# The project's own environment has none of these clients.
collect_ignore_glob = [] if importlib.util.find_spec("agents") else ["test_*.py"]


@dataclass(frozen=True)
class Demo:
    """A running demo."""

    url: str
    key: str = "sk-demo-all"
    model: str = MODEL

    @property
    def v1(self) -> str:
        """Where OpenAI's clients begin."""
        return f"{self.url}/v1"


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def await_answer(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5) as response:
                if response.status == 200:
                    return
        except OSError:
            time.sleep(0.3)
    raise RuntimeError(f"{url} did not answer:\n{log.read_text()[-3000:]}")


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    """`flexgate serve --demo` as users start it."""
    if url := os.environ.get("FLEXGATE_CLIENTS_URL"):
        yield Demo(url)
        return
    place, port = tmp_path_factory.mktemp("demo"), free_port()
    log = place / "log"
    ours = {"FLEXGATE_STATE_DIR": str(place / "state"), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    environment = os.environ | ours
    with log.open("wb") as output:
        command = [ROOT / ".venv/bin/flexgate", "serve", "--demo", "--port", str(port)]
        process = subprocess.Popen(command, stdout=output, stderr=output, cwd=place, env=environment)
    try:
        await_answer(f"http://127.0.0.1:{port}/ready", process, log)
        yield Demo(f"http://127.0.0.1:{port}")
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


@pytest.fixture(autouse=True)
def _no_other_server(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients read these where they are told nothing else."""
    monkeypatch.setenv("OPENAI_API_KEY", demo.key)
    monkeypatch.setenv("OPENAI_BASE_URL", demo.v1)
    monkeypatch.setenv("OPENAI_AGENTS_DISABLE_TRACING", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, help="write what came of each client's paths to this file")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RESULTS] = {}


RESULTS = pytest.StashKey[dict[str, dict[str, object]]]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):  # type: ignore[no-untyped-def]
    report = yield
    name = getattr(item.module, "CLIENT", None)
    if name is None or (report.when != "call" and report.passed):
        return report
    path = item.originalname.removeprefix("test_")
    if hasattr(item, "callspec") and "client" in item.callspec.params:
        client = item.callspec.params["client"]
        name, path, released = client.name, client.path, client.version
    else:
        released = version(item.module.PACKAGE)
    row = item.config.stash[RESULTS].setdefault(name, {"version": released, "paths": {}})
    paths = row["paths"]
    assert isinstance(paths, dict)
    paths[path] = "passed" if report.passed and paths.get(path) != "failed" else "failed"
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    file = session.config.getoption("--record", None)
    if file is not None:
        results = dict(sorted(session.config.stash[RESULTS].items()))
        file.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
