"""Engine watchdog: end an engine that hangs, because its experts could not be revoked."""

import asyncio
import logging
import multiprocessing
import time
from collections.abc import Callable
from contextlib import suppress

import psutil

from flexgate.server.engine.frontend.slot_control import SlotOperator
from flexgate.server.engine.protocol.slots import ANCHOR_SLOT
from flexgate.server.engine.seam.engine import EngineDeadError, envs

TICK_SECONDS = 1.0
READY_SECONDS = (
    15.0  # without an answer, after which a server is not ready; a step that is longer makes it so for a while
)

logger = logging.getLogger(__name__)


class Heartbeat:
    """When the engine core last answered between two steps."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """``clock`` is in seconds; nothing has answered yet."""
        self._clock = clock
        self._last: float | None = None

    def beat(self) -> None:
        """Note an answer."""
        self._last = self._clock()

    def fresh(self) -> bool:
        """Whether an answer came within `READY_SECONDS`."""
        return self._last is not None and self._clock() - self._last < READY_SECONDS


async def end_if_it_hangs(slots: SlotOperator, heartbeat: Heartbeat) -> None:
    """Kill an engine that takes longer from step to step than vLLM lets a worker process take.

    vLLM then sees a dead engine, as it does after a crash, and fails every running request.

    Args:
        heartbeat: beats with every answer, so that an engine that hangs is not ready long before it is killed.
    """
    seconds = envs.VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS
    while True:
        await asyncio.sleep(TICK_SECONDS)
        question = asyncio.ensure_future(slots.users(ANCHOR_SLOT))
        try:
            if not await _done_within(question, seconds):
                logger.error("the engine has not answered for %d seconds", seconds)
                _kill()
                return
            question.result()
        except EngineDeadError:
            return
        except Exception:  # vLLM reports whatever happens in the engine core as one; it is an answer
            logger.warning("the engine answered with an error", exc_info=True)
        finally:
            question.cancel()
        heartbeat.beat()


async def _done_within(question: "asyncio.Future[int]", seconds: int) -> bool:
    """Whether it is done, by ticks: a process that was halted has an answer to read before it counts on."""
    for _ in range(max(1, round(seconds / TICK_SECONDS))):
        await asyncio.wait({question}, timeout=TICK_SECONDS)
        if question.done():
            return True
    return False


def _kill() -> None:
    """End the engine core and the ranks below it, which would outlive it where they hang themselves."""
    for core in multiprocessing.active_children():
        with suppress(psutil.NoSuchProcess):
            ranks = psutil.Process(core.pid).children(recursive=True)
            core.kill()
            for rank in ranks:
                with suppress(psutil.NoSuchProcess):
                    rank.kill()
