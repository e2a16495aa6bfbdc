"""An engine that hangs must end: its requests would wait for ever, and nothing could be withdrawn from it."""

import asyncio
import logging
import multiprocessing

from vllm import envs

from flexgate.server.engine.operator import SlotOperator
from flexgate.server.engine.seam import EngineDeadError
from flexgate.server.engine.slots import ANCHOR_SLOT

PAUSE_SECONDS = 1.0

logger = logging.getLogger(__name__)


async def end_if_it_hangs(slots: SlotOperator) -> None:
    """Kill the engine core once it takes longer from step to step than vLLM lets a worker process take.

    vLLM then sees a dead engine, as it does after a crash, and tells every request.
    """
    seconds = envs.VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS
    while True:
        await asyncio.sleep(PAUSE_SECONDS)
        try:
            async with asyncio.timeout(seconds):
                await slots.users(ANCHOR_SLOT)
        except TimeoutError:
            logger.error("the engine has not answered for %d seconds", seconds)
            for process in multiprocessing.active_children():
                process.kill()
            return
        except EngineDeadError:
            return
