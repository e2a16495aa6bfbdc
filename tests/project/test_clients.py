"""What the documents say of clients is what one run found of all of them, as locked; and a part of a lock is whole."""

import ast
import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from works_with import recorded

ROOT = Path(__file__).parents[2]
CLIENTS = ROOT / "tests/clients"
LOCK = (ROOT / "locks/clients.txt").read_text()
MODULES = {module.name: module.read_text() for module in CLIENTS.glob("test_*.py")}
ALONE = {
    name: found[1]
    for name, text in MODULES.items()
    if (found := re.search(r'^CLIENT, PACKAGE = "(.*?)", ', text, re.MULTILINE))
}
"""Modules of one client, which have a test for each of its paths."""


def test_every_path_of_every_client_passed_in_one_run_as_locked() -> None:
    locks = LOCK + "".join((ROOT / "locks" / name).read_text() for name in ("inspect.txt", "cpu.txt"))
    pinned = set(re.findall(r"^[a-z0-9-]+==([^ ]+)", locks, re.MULTILINE))
    packages = json.loads((CLIENTS / "package-lock.json").read_text())["packages"]
    pinned |= {package["version"] for package in packages.values() if "version" in package}
    results = recorded()
    assert results["tests"].keys() == {"passed"}
    for name, row in results["clients"].items():
        assert row["version"] in pinned, name
        assert set(row["paths"].values()) == {"passed"}, name


def test_every_client_was_run() -> None:
    ran = recorded()["clients"]
    for module, client in ALONE.items():
        functions = {node.name for node in ast.parse(MODULES[module]).body if hasattr(node, "name")}
        paths = {name.removeprefix("test_") for name in functions if name.startswith("test_")}
        assert ran[client]["paths"].keys() == paths, module
    others = {module: text for module, text in MODULES.items() if module not in ALONE}
    for module, text in others.items():
        assert any(f'"{client}"' in text for client in ran), module
    for client in ran.keys() - set(ALONE.values()):
        assert any(f'"{client}"' in text for text in others.values()), client


@pytest.fixture(scope="module")
def closure() -> ModuleType:
    spec = importlib.util.spec_from_file_location("flexgate_closure", CLIENTS / "closure.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PINS = """\
a==1 \\
    --hash=sha256:0a \\
    --hash=sha256:1a
    # via b, c
b==2 \\
    --hash=sha256:0b
    # via c, d
c==3 \\
    --hash=sha256:0c
    # via b, -r locks/clients.in
d==4 \\
    --hash=sha256:0d
    # via -r locks/clients.in
"""


def test_a_part_of_a_lock_has_all_that_its_package_needs_and_no_more(closure: ModuleType) -> None:
    head, tail = PINS.split("d==4")
    assert closure.closure(PINS, {"c"}) == head
    assert closure.closure(PINS, {"d"}) == head + "d==4" + tail
    assert closure.closure(PINS, {"a"}) == head.split("b==2")[0]
    with pytest.raises(KeyError, match="the lock has no e"):
        closure.closure(PINS, {"e"})


@pytest.mark.parametrize("module", ALONE)
def test_a_part_of_the_lock_can_be_taken_for_each_client(closure: ModuleType, module: str) -> None:
    (package,) = re.findall(r'^CLIENT, PACKAGE = ".*?", "(.*)"', MODULES[module], re.MULTILINE)
    part = closure.closure(LOCK, {package})
    assert set(re.findall(r"^([a-z-]+)==", part, re.MULTILINE)) >= {package}
    assert part.count("# via ") == part.count("==") < LOCK.count("==") == LOCK.count("# via ")


@pytest.mark.slow
def test_a_registry_that_does_not_answer_fails_the_installation_with_a_reason(tmp_path: Path) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        registry = {
            "PIP_INDEX_URL": f"http://127.0.0.1:{silent.getsockname()[1]}/simple",
            "PIP_CONFIG_FILE": os.devnull,
        }
        variables = [f"CLIENTS={tmp_path}", f"PYTHON={sys.executable}", "INSTALL_SECONDS=5"]
        done = subprocess.run(
            ["make", *variables, f"{tmp_path}/one/llm/.installed"],
            cwd=ROOT,
            env={name: value for name, value in os.environ.items() if not name.startswith("PIP_")} | registry,
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode != 0
    assert f"cannot install {tmp_path}/one/llm: the registry refused, or did not answer within 5 s" in done.stderr
    assert not (tmp_path / "one/llm/.installed").exists()
