"""A process that is begun early becomes what a spawned one would be, or one is spawned."""

import logging
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from flexgate.server.engine.core_process import EarlyContext, EarlyProcess


@pytest.fixture
def early(monkeypatch: pytest.MonkeyPatch) -> Iterator[EarlyProcess]:
    for name in ("LD_PRELOAD", "TORCHINDUCTOR_COMPILE_THREADS", "TORCHINDUCTOR_CPP_DYNAMIC_THREADS"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    with EarlyProcess(modules=("json",)) as process:
        yield process


def run(context: EarlyContext, place: Path, *variables: str) -> list[str]:
    """The id of the process that ran, and the values it found."""
    program = f"import os; open({str(place)!r}, 'w').write(' '.join([str(os.getpid()), *map(os.getenv, {variables})]))"
    process = context.Process(target=exec, args=(program,), name="EngineCore")
    process.start()
    process.join(60)
    assert process.exitcode == 0
    ran = place.read_text().split()
    assert int(ran[0]) == process.pid
    return ran


def test_the_early_process_runs_what_the_first_process_is_given(early: EarlyProcess, tmp_path: Path) -> None:
    context = EarlyContext(early)
    assert int(run(context, tmp_path / "first")[0]) == early.pid
    assert int(run(context, tmp_path / "second")[0]) != early.pid


def test_it_runs_with_what_vllm_set_meanwhile(
    early: EarlyProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = EarlyContext(early)
    monkeypatch.setenv("VLLM_SSM_CONV_STATE_LAYOUT", "SD")
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    ran = run(context, tmp_path / "note", "VLLM_SSM_CONV_STATE_LAYOUT", "TORCHINDUCTOR_COMPILE_THREADS")
    assert ran == [str(early.pid), "SD", "1"]


def test_one_is_spawned_where_the_early_one_loaded_under_another_environment(
    early: EarlyProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    context = EarlyContext(early)
    monkeypatch.setenv("OMP_NUM_THREADS", "17")
    with caplog.at_level(logging.WARNING):
        pid, threads = run(context, tmp_path / "note", "OMP_NUM_THREADS")
    assert int(pid) != early.pid
    assert threads == "17"
    assert "OMP_NUM_THREADS" in caplog.text
    assert not psutil.pid_exists(early.pid)


def test_one_is_spawned_where_the_early_one_has_died(early: EarlyProcess, tmp_path: Path) -> None:
    context = EarlyContext(early)
    dead = psutil.Process(early.pid)
    dead.kill()
    while dead.status() != psutil.STATUS_ZOMBIE:
        pass
    assert int(run(context, tmp_path / "note")[0]) != early.pid


def test_a_process_with_file_descriptors_is_refused(early: EarlyProcess) -> None:
    ours, _ = multiprocessing.Pipe()
    with pytest.raises(ValueError, match="no file descriptors"):
        EarlyContext(early).Process(target=print, args=(ours,), name="EngineCore").start()


def test_untold_it_ends_with_its_block() -> None:
    with EarlyProcess(modules=("json",)) as early:
        assert psutil.Process(early.pid).status() != psutil.STATUS_ZOMBIE
    assert not psutil.pid_exists(early.pid)


def ended(pid: int) -> None:
    with suppress(psutil.NoSuchProcess):
        psutil.Process(pid).wait(60)


def after_its_parent(program: str) -> subprocess.CompletedProcess[str]:
    """Make a process early in a parent that then ends without a word."""
    begin = "import os; from flexgate.server.engine.core_process import EarlyContext, EarlyProcess;"
    lines = f"{begin} early = EarlyProcess(modules=('json',)); print(early.pid, flush=True); {program}; os._exit(0)"
    return subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, timeout=60)


def test_untold_it_ends_quietly_after_its_parent() -> None:
    done = after_its_parent("pass")
    ended(int(done.stdout))
    assert done.stderr == ""


def test_told_it_notices_the_end_of_its_parent(tmp_path: Path) -> None:
    """Which is what the engine core's lifeline waits for."""
    place = tmp_path / "note"
    follow = f"import multiprocessing as m; m.parent_process().join(); open({str(place)!r}, 'w').write('noticed')"
    done = after_its_parent(f"EarlyContext(early).Process(target=exec, args=({follow!r},), name='EngineCore').start()")
    ended(int(done.stdout))
    assert place.read_text() == "noticed"


START = """
import asyncio, multiprocessing, sys
from pathlib import Path
from flexgate.server.engine import launch

class Early(launch.EarlyProcess):
    def __init__(self):
        super().__init__()
        print("EARLY", self.pid)

launch.EarlyProcess = Early

async def start():
    settings = launch.EngineSettings(
        Path(sys.argv[1]), dtype="float32", enforce_eager=True, kv_cache_memory_bytes=64 << 20
    )
    async with launch.launch(settings):
        print("CORE", *(process.pid for process in multiprocessing.active_children()))

if __name__ == "__main__":
    asyncio.run(start())
"""


@pytest.mark.engine
@pytest.mark.slow
def test_the_engine_core_is_the_process_that_was_begun_early(checkpoint: Path, tmp_path: Path) -> None:
    script = tmp_path / "start.py"
    script.write_text(START)
    run = subprocess.run([sys.executable, script, checkpoint], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    told = dict(line.split(" ", 1) for line in run.stdout.splitlines() if line.startswith(("EARLY ", "CORE ")))
    assert told["CORE"] == told["EARLY"]
