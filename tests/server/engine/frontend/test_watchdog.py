"""An engine that hangs is ended; one that is slow, or that was halted together with its server, is not."""

import asyncio
import multiprocessing
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from enginekit.launched import launched

from flexgate.server.engine.frontend import watchdog
from flexgate.server.engine.seam.engine import EngineDeadError

SECONDS = 3
SLEEP = "import time; time.sleep(60)"
WITH_A_CHILD = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {SLEEP!r}]); {SLEEP}"

HALTED_BEFORE_IT_PROVES_ITSELF = """
import signal
prove = launch._prove

async def halted(*args):
    for core in multiprocessing.active_children():
        os.kill(core.pid, signal.SIGSTOP)
    return await prove(*args)

launch._prove = halted
"""


class Slots:
    """Answers as it is told to, the first time, and then that the engine has died."""

    def __init__(self, answer: Callable[[], Awaitable[int]]) -> None:
        self.answer = answer
        self.asked = 0

    async def users(self, _slot: int) -> int:
        self.asked += 1
        if self.asked > 1:
            raise EngineDeadError
        return await self.answer()


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS", str(SECONDS))
    monkeypatch.setattr(watchdog, "TICK_SECONDS", 0.1)
    process = multiprocessing.get_context("spawn").Process(target=exec, args=(WITH_A_CHILD,))
    process.start()
    # The tests' own engines are children too.
    monkeypatch.setattr(watchdog.multiprocessing, "active_children", lambda: [process])
    yield process
    for child in psutil.Process(process.pid).children() if process.is_alive() else []:
        child.kill()
    process.kill()
    process.join()


async def _never() -> int:
    return await asyncio.get_running_loop().create_future()


async def _slow() -> int:
    await asyncio.sleep(SECONDS / 2)
    return 0


async def _halted() -> int:
    asyncio.get_running_loop().call_soon(time.sleep, SECONDS + 0.5)
    await asyncio.sleep(0.2)
    return 0


async def _fails() -> int:
    raise Exception("Server shutting down")


@pytest.mark.asyncio
async def test_an_engine_that_hangs_is_ended_with_all_its_ranks(core: Any, caplog: pytest.LogCaptureFixture) -> None:
    while not (ranks := psutil.Process(core.pid).children()):
        await asyncio.sleep(0.05)
    heartbeat = watchdog.Heartbeat()
    await watchdog.end_if_it_hangs(Slots(_never), heartbeat)
    assert not heartbeat.fresh()
    core.join(30)
    assert core.exitcode == -9
    _, alive = psutil.wait_procs(ranks, timeout=30)
    assert not alive
    assert "has not answered for 3 seconds" in caplog.text


@pytest.mark.asyncio
@pytest.mark.parametrize("answer", [_slow, _halted, _fails])
async def test_one_that_answers_in_whatever_way_lives_and_is_asked_again(
    core: Any, answer: Callable[[], Awaitable[int]]
) -> None:
    slots = Slots(answer)
    heartbeat = watchdog.Heartbeat()
    await watchdog.end_if_it_hangs(slots, heartbeat)
    assert slots.asked == 2
    assert heartbeat.fresh()
    assert core.is_alive()


def test_a_heartbeat_is_fresh_from_an_answer_on_for_a_stated_time() -> None:
    now = 100.0
    heartbeat = watchdog.Heartbeat(lambda: now)
    assert not heartbeat.fresh()
    heartbeat.beat()
    now += watchdog.READY_SECONDS - 0.001
    assert heartbeat.fresh()
    now += 0.001
    assert not heartbeat.fresh()
    heartbeat.beat()
    assert heartbeat.fresh()


@pytest.mark.engine
@pytest.mark.slow
def test_a_start_ends_whose_engine_hangs(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS", "5")
    run = launched(checkpoint, tmp_path, HALTED_BEFORE_IT_PROVES_ITSELF)
    assert run.returncode == 1
    assert "SERVED" not in run.stdout
    assert "has not answered for 5 seconds" in run.stderr
    assert "EngineDeadError" in run.stderr
