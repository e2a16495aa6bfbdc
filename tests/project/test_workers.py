"""Spreading tests over workers: what runs for several tests is started once, and on one worker."""

import os
import subprocess
import sys
from pathlib import Path

SUPPORT = Path(__file__).parents[1] / "support"
FILES = {
    "conftest.py": """
        import os, pytest, workers
        from workers import pytest_configure_node, pytest_xdist_make_scheduler

        def pytest_collection_modifyitems(config, items):
            workers.spread(config, items)

        def note(what):
            with open("started", "a") as file:
                file.write(what + "\\n")

        @pytest.fixture(scope="session", params=["a", "b"])
        def kind(request):
            return request.param

        @pytest.fixture(scope="session")
        def engine(kind):
            note("engine " + kind)
            yield kind

        @pytest.fixture(scope="module")
        def server(request):
            note("server of " + request.node.name)
            yield

        @pytest.fixture(autouse=True)
        def worker():
            note("worker " + os.environ["PYTEST_XDIST_WORKER"])
    """,
    "test_first.py": """
        import pytest

        @pytest.mark.parametrize("number", range(4))
        def test_engine(engine, number): pass

        @pytest.mark.parametrize("number", range(4))
        def test_server(server, number): pass

        @pytest.mark.parametrize("number", range(4))
        def test_nothing(number): pass
    """,
    "test_second.py": """
        import pytest

        @pytest.mark.parametrize("number", range(4))
        def test_engine(engine, number): pass

        @pytest.mark.parametrize("number", range(4))
        def test_server(server, number): pass

        @pytest.mark.parametrize("number", range(4))
        def test_nothing(number): pass
    """,
}


def test_what_runs_for_several_tests_starts_once_on_two_workers(tmp_path: Path) -> None:
    for name, text in FILES.items():
        (tmp_path / name).write_text("\n".join(line.removeprefix("        ") for line in text.splitlines()))
    spread = ["-pxdist", "-n2", "--dist=loadgroup", "--no-loadscope-reorder"]
    path = os.pathsep.join([str(SUPPORT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *spread], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    assert "32 passed" in done.stdout
    lines = (tmp_path / "started").read_text().splitlines()
    started = [line for line in lines if not line.startswith("worker")]
    assert sorted(started) == ["engine a", "engine b", "server of test_first.py", "server of test_second.py"]
    assert set(lines) >= {"worker gw0", "worker gw1"}
