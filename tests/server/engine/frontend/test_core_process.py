"""A process that is begun early becomes what a spawned one would be, or one is spawned."""

import logging
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from enginekit.launched import launched

from flexgate.server.engine.frontend.core_process import EarlyContext, EarlyProcess, preloaded

LIGHT = ("json",)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is set here, the tests that follow do not find."""
    for name in ("LD_PRELOAD", "TORCHINDUCTOR_COMPILE_THREADS", "TORCHINDUCTOR_CPP_DYNAMIC_THREADS"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.setenv("VLLM_SSM_CONV_STATE_LAYOUT", "DS")


@pytest.fixture
def early(environment: None) -> Iterator[EarlyProcess]:
    with EarlyProcess(LIGHT) as process:
        yield process


def run(context: EarlyContext, place: Path, *variables: str) -> list[str]:
    """The id of the process that ran, and the values it found."""
    program = (
        f"import os; open({str(place)!r}, 'w').write(' '.join(map(str, [os.getpid(), *map(os.getenv, {variables})])))"
    )
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
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.delenv("VLLM_SSM_CONV_STATE_LAYOUT")
    ran = run(context, tmp_path / "note", "LOCAL_WORLD_SIZE", "VLLM_SSM_CONV_STATE_LAYOUT")
    assert ran == [str(early.pid), "1", "None"]


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


def test_one_is_spawned_where_the_early_one_has_died(
    early: EarlyProcess, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    context = EarlyContext(early)
    os.kill(early.pid, signal.SIGKILL)
    os.waitid(os.P_PID, early.pid, os.WEXITED | os.WNOWAIT)
    assert int(run(context, tmp_path / "note")[0]) != early.pid
    assert "has ended" in caplog.text
    assert not psutil.pid_exists(early.pid)


def test_one_is_spawned_that_is_given_file_descriptors(early: EarlyProcess, caplog: pytest.LogCaptureFixture) -> None:
    ours, given = multiprocessing.Pipe()
    process = EarlyContext(early).Process(target=exec, args=("end.send(7)", {"end": given}), name="EngineCore")
    process.start()
    assert ours.recv() == 7
    process.join(60)
    assert process.pid != early.pid
    assert "file descriptors" in caplog.text
    assert not psutil.pid_exists(early.pid)


def test_untold_it_ends_with_its_block() -> None:
    with EarlyProcess(LIGHT) as early:
        assert psutil.Process(early.pid).status() != psutil.STATUS_ZOMBIE
    assert not psutil.pid_exists(early.pid)


def test_what_cannot_be_pickled_leaves_no_process() -> None:
    with EarlyProcess(LIGHT) as early, pytest.raises(Exception, match="pickle"):
        EarlyContext(early).Process(target=lambda: None, name="EngineCore").start()
    assert not psutil.pid_exists(early.pid)


def test_it_imports_from_where_its_parent_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "only_of_the_parent.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with EarlyProcess(("only_of_the_parent",)) as early:
        imported = "import sys; assert 'only_of_the_parent' in sys.modules"
        process = EarlyContext(early).Process(target=exec, args=(imported,), name="EngineCore")
        process.start()
        process.join(60)
        assert (process.pid, process.exitcode) == (early.pid, 0)


def test_libraries_are_loaded_first_as_vllm_has_it(tmp_path: Path) -> None:
    torch, vllm = tmp_path / "torch", tmp_path / "vllm"
    openmp, allocator = torch / "lib" / "libgomp.so.1", vllm / "libs" / "libtcmalloc_minimal.so.4"
    for library in (openmp, allocator):
        library.parent.mkdir(parents=True)
    assert preloaded("", torch, vllm) == ""
    openmp.touch()
    assert preloaded("", torch, vllm) == str(openmp)
    allocator.touch()
    assert preloaded("mine.so", torch, vllm) == f"{allocator}:mine.so:{openmp}"
    assert preloaded("libiomp5.so:libtcmalloc.so", torch, vllm) == "libiomp5.so:libtcmalloc.so"


def ended(pid: int) -> None:
    with suppress(psutil.NoSuchProcess):
        psutil.Process(pid).wait(60)


def after_its_parent(program: str, module: str = "json") -> subprocess.CompletedProcess[str]:
    """Make a process early in a parent that then ends without a word."""
    begin = "import os; from flexgate.server.engine.frontend.core_process import EarlyContext, EarlyProcess"
    lines = f"{begin}\nearly = EarlyProcess([{module!r}])\nprint(early.pid, flush=True)\n{program}\nos._exit(0)"
    return subprocess.run(
        [sys.executable, "-c", lines], capture_output=True, text=True, timeout=60, start_new_session=True
    )


def test_untold_it_ends_quietly_after_its_parent() -> None:
    done = after_its_parent("pass")
    ended(int(done.stdout))
    assert done.stderr == ""


INTERRUPTED = """
import signal, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
while not os.path.exists({loading!r}):
    time.sleep(0.01)
os.killpg(0, signal.SIGINT)
core = EarlyContext(early).Process(target=print, name="EngineCore")
core.start()
core.join()
print(core.pid, core.exitcode)
"""


def test_ctrl_c_is_left_to_its_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which may be in the midst of what it cannot interrupt."""
    loading = tmp_path / "loading"
    (tmp_path / "slow_to_load.py").write_text(f"import time; open({str(loading)!r}, 'w'); time.sleep(1)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    done = after_its_parent(INTERRUPTED.format(loading=str(loading)), "slow_to_load")
    early, core, status = done.stdout.split()
    assert (core, status, done.stderr) == (early, "0", "")


def test_told_it_notices_the_end_of_its_parent(tmp_path: Path) -> None:
    """Which is what the engine core's parent watchdog waits for."""
    place = tmp_path / "note"
    follow = f"import multiprocessing as m; m.parent_process().join(); open({str(place)!r}, 'w').write('noticed')"
    done = after_its_parent(f"EarlyContext(early).Process(target=exec, args=({follow!r},), name='EngineCore').start()")
    ended(int(done.stdout))
    assert place.read_text() == "noticed"


NOTED = """
class Early(launch.EarlyProcess):
    def __init__(self, modules):
        super().__init__(modules)
        print("EARLY", self.pid)

launch.EarlyProcess = Early
"""


@pytest.mark.engine
@pytest.mark.slow
def test_the_engine_core_is_the_process_that_was_begun_early(checkpoint: Path, tmp_path: Path) -> None:
    run = launched(checkpoint, tmp_path, NOTED)
    assert run.returncode == 0, run.stderr
    told = dict(line.split(" ", 1) for line in run.stdout.splitlines() if line.startswith(("EARLY ", "SERVED ")))
    assert told["SERVED"] == told["EARLY"]
