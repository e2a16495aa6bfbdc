"""No Docker engine is at hand: the image's install steps are held equal to those that CI runs."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
RUNTIME = (ROOT / "Makefile").read_text().split("\n$(VENV)/.runtime:")[1]
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
