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

        @pytest.mark.parametrize("kind", ["b"], indirect=True, scope="session")
        def test_one_kind(engine, kind): pass
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


CRASHES = {
    "conftest.py": """
        import os, time, workers
        from pathlib import Path
        from workers import pytest_configure_node, pytest_xdist_make_scheduler

        def pytest_collection_modifyitems(config, items):
            workers.spread(config, items)
            if os.environ["PYTEST_XDIST_WORKER"] == "gw2":  # takes a dead one's place, and begins after gw3
                deadline = time.monotonic() + 60
                while not Path("gw3").exists() and time.monotonic() < deadline:
                    time.sleep(0.01)

        def pytest_runtest_setup(item):
            Path(os.environ["PYTEST_XDIST_WORKER"]).touch()
    """,
    **{
        f"test_{name}.py": f"""
        import os, pytest, time
        from pathlib import Path

        def test_dies():
            Path("{name}").touch()
            while not Path("{other}").exists():
                time.sleep(0.01)
            os._exit(1)

        @pytest.mark.parametrize("number", range(8))
        def test_lives(number): pass
    """
        for name, other in (("first", "second"), ("second", "first"))
    },
}


def run(folder: Path, files: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    """Run test files on two workers; lines are indented by eight."""
    for name, text in files.items():
        (folder / name).write_text("\n".join(line.removeprefix("        ") for line in text.splitlines()))
    spread = ["-pxdist", "-n2", "--dist=loadgroup", "--no-loadscope-reorder"]
    path = os.pathsep.join([str(SUPPORT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-m", "pytest", "-q", *spread]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_what_runs_for_several_tests_starts_once_on_two_workers(tmp_path: Path) -> None:
    done = run(tmp_path, FILES)
    assert done.returncode == 0, done.stdout
    assert "33 passed" in done.stdout
    lines = (tmp_path / "started").read_text().splitlines()
    started = [line for line in lines if not line.startswith("worker")]
    assert sorted(started) == ["engine a", "engine b", "server of test_first.py", "server of test_second.py"]
    assert set(lines) >= {"worker gw0", "worker gw1"}


def test_two_workers_that_die_together_cost_their_tests_alone(tmp_path: Path) -> None:
    done = run(tmp_path, CRASHES)
    assert done.returncode == 1, done.stdout
    assert "2 failed, 16 passed" in done.stdout
    for name in ("first", "second"):
        assert f"FAILED test_{name}.py::test_dies" in done.stdout
