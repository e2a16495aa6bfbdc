"""Slices of the client suite, which `make verify` runs whole: two clients always, one that the commit chooses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CLIENTS = sorted(module.stem.removeprefix("test_") for module in (ROOT / "tests/clients").glob("test_*.py"))
INSTALL_SECONDS = 600
pytestmark = pytest.mark.slow


def assert_passes(command: list[str], demo: str, place: Path = ROOT) -> None:
    environment = os.environ | {"FLEXGATE_CLIENTS_URL": demo, "PYTHON": sys.executable}
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]


@pytest.mark.parametrize("client", ["openai", "langchain"])
def test_a_client_of_the_development_environment_passes(demo: str, client: str) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"test_{client}.py"]
    assert_passes(command, demo, ROOT / "tests/clients")


@pytest.mark.sliced(1)
@pytest.mark.parametrize("client", CLIENTS)
def test_a_client_in_an_environment_of_its_own_passes(demo: str, client: str) -> None:
    assert_passes(["make", "test-client", f"CLIENT={client}", f"INSTALL_SECONDS={INSTALL_SECONDS}"], demo)
