"""Real clients against the running demo, in an environment of their own: `make test-clients`.

Each module is one client, and each of its tests one path: `test_conversation`, `test_tools`, `test_stream`,
`test_structured`, `test_refusal`. `FLEXGATE_CLIENTS_URL` names a demo that is running already; `--record=FILE` writes
how each path ended, from which `tests/support/works_with.py` makes the table in `docs/support.md`.
"""

import json
import os
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from demo_server import serve_demo

ROOT = Path(__file__).parents[2]
MODEL = "flexgate-demo"
TOKENIZER = ROOT / "experts/demo/checkpoint"


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


@dataclass(frozen=True)
class Client:
    """One path of a client, for modules that run several clients or one of another environment."""

    name: str
    path: str
    version: Callable[[], str]

    def __str__(self) -> str:
        return f"{self.name}-{self.path}"


def installed(package: str, python: Path) -> str:
    """The version of a package in the environment of an interpreter."""
    code = f"from importlib.metadata import version; print(version({package!r}))"
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def finished(command: list[str | Path], place: Path) -> None:
    """Run a command to its end in a folder, with nothing fetched from elsewhere."""
    environment = os.environ | {"PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    """`flexgate serve --demo` as users start it."""
    if url := os.environ.get("FLEXGATE_CLIENTS_URL"):
        yield Demo(url)
        return
    with serve_demo(tmp_path_factory.mktemp("demo")) as url:
        yield Demo(url)


@pytest.fixture(autouse=True)
def _no_other_server(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients read these where they are told nothing else."""
    monkeypatch.setenv("OPENAI_API_KEY", demo.key)
    monkeypatch.setenv("OPENAI_BASE_URL", demo.v1)
    monkeypatch.setenv("OPENAI_AGENTS_DISABLE_TRACING", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, help="write how each path of each client ended to this file")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[CLIENTS], config.stash[OUTCOMES] = {}, Counter()


CLIENTS = pytest.StashKey[dict[str, dict[str, Any]]]()
OUTCOMES = pytest.StashKey[Counter[str]]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):  # type: ignore[no-untyped-def]
    report = yield
    if report.when != "call" and report.passed:
        return report
    client = item.callspec.params.get("client") if hasattr(item, "callspec") else None
    if client is None:
        released, path = version(item.module.PACKAGE), item.originalname.removeprefix("test_")
        client = Client(item.module.CLIENT, path, lambda: released)
    row = item.config.stash[CLIENTS].setdefault(client.name, {"version": client.version(), "paths": {}})
    before = row["paths"].get(client.path, report.outcome)
    row["paths"][client.path] = report.outcome if before == "passed" else before
    item.config.stash[OUTCOMES][report.outcome] += 1
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    file = session.config.getoption("--record", None)
    if file is not None:
        outcomes, clients = session.config.stash[OUTCOMES], session.config.stash[CLIENTS]
        results = {"tests": dict(sorted(outcomes.items())), "clients": dict(sorted(clients.items()))}
        file.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
