"""One process that tries constraints, seen from the server. A fault of it ends it, and what it was to answer."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from contextlib import suppress
from itertools import count
from typing import Any, Final

from flexgate.server.engine.frontend.constraints.worker import LENGTH
from flexgate.server.engine.grammars.native import HUNG_SECONDS, environment

logger = logging.getLogger(__name__)

ANSWER_SECONDS: Final = HUNG_SECONDS + 30
"""On the clock: it answers within less, for children that hang too."""


class Trials:
    """The process and what it was asked; begin it with :meth:`begin`."""

    def __init__(self, process: asyncio.subprocess.Process, tokenizer: str) -> None:
        self.process = process
        self.alive = True
        self._asked: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._numbers = count(1)
        self._send({"tokenizer": tokenizer})
        self._listening = asyncio.create_task(self._listen())

    @classmethod
    async def begin(cls, tokenizer: str) -> Trials:
        """Begin a process; ``tokenizer`` is xgrammar's serialised `TokenizerInfo`. Raises `OSError`."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "flexgate.server.engine.frontend.constraints.worker"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=environment(),
        )
        return cls(process, tokenizer)

    async def ask(self, job: dict[str, Any]) -> dict[str, Any]:
        """The answer to a job; ``busy`` says why there is none, as the process has ended."""
        if not self.alive:
            return _ENDED
        number = next(self._numbers)
        answer = self._asked[number] = asyncio.get_running_loop().create_future()
        self._send({"id": number, **job})
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                return await answer
        except TimeoutError:
            logger.error("ended the process that compiles constraints: no answer for %s s", ANSWER_SECONDS)
            self._end()
            return _ENDED
        finally:
            self._asked.pop(number, None)

    async def stop(self) -> None:
        """End the process."""
        self._end()
        self._listening.cancel()
        await self.process.wait()

    def _send(self, message: dict[str, Any]) -> None:
        if self.process.stdin is not None:
            written = json.dumps(message).encode()
            self.process.stdin.write(LENGTH.pack(len(written)) + written)

    async def _listen(self) -> None:
        try:
            while self.process.stdout is not None:
                (length,) = LENGTH.unpack(await self.process.stdout.readexactly(LENGTH.size))
                answer = json.loads(await self.process.stdout.readexactly(length))
                asked = self._asked.pop(answer["id"], None)
                if asked is not None and not asked.done():
                    asked.set_result(answer)
        except asyncio.IncompleteReadError:
            logger.warning("the process that compiles constraints ended")
        except Exception:
            logger.exception("ended the process that compiles constraints: its answer cannot be read")
        finally:
            self._end()

    def _end(self) -> None:
        self.alive = False
        with suppress(ProcessLookupError):
            self.process.kill()
        for asked in self._asked.values():
            if not asked.done():
                asked.set_result(_ENDED)


_ENDED: Final = {"busy": "the process that compiles constraints ended"}
