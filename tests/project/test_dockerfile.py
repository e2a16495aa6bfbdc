"""Without a container engine: the image installs what CI installs, and documented commands fit the image."""

import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from flexgate.server.lifecycle.settings import load_settings

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
PIP_INSTALL = re.findall(r"^PIP_INSTALL := (.*)$", MAKEFILE, re.MULTILINE)[0]
RUNTIME = MAKEFILE.split("\n$(VENV)/.runtime:")[1].replace("$(PIP_INSTALL)", PIP_INSTALL)
FLAGS = re.compile(r"pip install (?P<flags>.*?) -r (?P<first>\S+) -r (?P<second>\S+)")


def lock_step(text: str) -> tuple[set[str], str, str]:
    found = FLAGS.search(text)
    assert found is not None
    flags = {flag for flag in found["flags"].split() if flag in ("--no-deps", "--require-hashes")}
    return flags, found["first"], found["second"]


def target(name: str) -> str:
    return re.split(r"^FROM ", DOCKERFILE.split(f"AS {name}\n")[1], flags=re.MULTILINE)[0]


def test_the_cpu_image_installs_the_locks_that_make_installs() -> None:
    assert (
        lock_step(target("cpu"))
        == lock_step(RUNTIME)
        == ({"--no-deps", "--require-hashes"}, "locks/cpu.txt", "locks/torch-cpu.txt")
    )


def test_the_image_holds_the_wheel_and_not_the_checkout() -> None:
    final = DOCKERFILE.split("AS base\n")[1]
    assert re.findall(r"^COPY (.*)$", final, re.MULTILINE) == ["locks /locks", "--from=build /wheels /wheels"]


def test_every_final_image_is_unprivileged_and_has_a_health_check() -> None:
    for name in ("cpu", "cuda"):
        assert "\nUSER flexgate\n" in target(name)
        assert "HEALTHCHECK" in target(name)
        assert "--demo" not in target(name)


def test_the_build_step_uses_the_pinned_build_backend() -> None:
    pinned = re.search(r"setuptools==[\d.]+", (ROOT / "pyproject.toml").read_text())
    assert pinned is not None
    assert pinned[0] in DOCKERFILE
    assert f"{pinned[0]} " in (ROOT / "locks/cpu.txt").read_text()


def test_the_documented_container_is_reachable_and_keeps_its_state(monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "operations.md").read_text()
    (words,) = re.findall(r"^\$ (docker run (?:.*\\\n)*.*)$", page, re.MULTILINE)
    run, serve = map(shlex.split, re.split(r" flexgate\s+serve ", words.replace("\\\n", " ")))
    volumes = [value.split(":")[1] for name, value in pairwise(run) if name == "-v"]
    (state,) = re.findall(r"FLEXGATE_STATE_DIR=(\S+)", DOCKERFILE)
    (port,) = set(re.findall(r"EXPOSE (\d+)", DOCKERFILE))
    assert state in volumes
    assert run[run.index("-p") + 1] == f"127.0.0.1:8000:{port}"
    assert any(serve[0].startswith(f"{folder}/") for folder in volumes)
    monkeypatch.setenv("FLEXGATE_STATE_DIR", state)
    settings = load_settings(
        model=serve[0], host=serve[serve.index("--host") + 1], allow_remote=serve[-1] == "--allow-remote"
    )
    assert (settings.host, settings.port, str(settings.state_dir)) == ("0.0.0.0", int(port), state)


def test_the_documented_install_is_that_of_make() -> None:
    page = (ROOT / "docs" / "operations.md").read_text()
    assert lock_step(page) == lock_step(RUNTIME)
