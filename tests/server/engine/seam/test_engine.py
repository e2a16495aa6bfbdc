"""What the seam asks of the operating system, and of an engine that dies."""

import asyncio
import subprocess
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import torch

ASK = """
import ctypes, sys
import torch
from flexgate.server.engine.seam.engine import allow_amx_tiles

def permitted():
    mask = ctypes.c_uint64()
    ctypes.CDLL(None).syscall(158, 0x1022, ctypes.byref(mask))  # arch_prctl(ARCH_GET_XCOMP_PERM)
    return bool(mask.value >> 18 & 1)

before = permitted()
allow_amx_tiles()
print(before, permitted())
"""


@pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="this processor has no AMX tiles")
def test_amx_tiles_are_asked_for() -> None:
    """Linux ends a process that uses them without having asked; importing vLLM does not ask."""
    said = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, check=True).stdout
    assert said.splitlines()[-1] == "False True"


def test_a_refusal_of_amx_tiles_is_told_before_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    from flexgate.server.engine.seam.engine import allow_amx_tiles

    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: False)
    with pytest.raises(RuntimeError, match="use --dtype float32"):
        allow_amx_tiles()


class DyingEngine:
    """Answers nothing, as vLLM's does once its core is gone."""

    def __init__(self) -> None:
        self.errored = False
        self.engine_core = self
        self.question: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def call_utility_async(self, *_: Any) -> Awaitable[Any]:
        return self.question

    def collective_rpc(self, *_: Any, **__: Any) -> Awaitable[Any]:
        return self.question


async def _ask_core(engine: DyingEngine) -> Any:
    from flexgate.server.engine.seam.engine import ask_engine_core

    return await ask_engine_core(engine, "users", {})


async def _ask_ranks(engine: DyingEngine) -> Any:
    from flexgate.server.engine.seam.engine import ask_ranks

    return await ask_ranks(engine, "flexgate_open", 1, 2)


@pytest.mark.asyncio
@pytest.mark.parametrize("ask", [_ask_core, _ask_ranks])
async def test_a_question_that_is_open_when_the_engine_dies_ends(ask: Callable[[DyingEngine], Awaitable[Any]]) -> None:
    from flexgate.server.engine.seam.engine import EngineDeadError

    engine = DyingEngine()
    asking = asyncio.ensure_future(ask(engine))
    await asyncio.sleep(0)
    engine.errored = True
    with pytest.raises(EngineDeadError):
        await asyncio.wait_for(asking, 30)
    assert engine.question.cancelled()


@pytest.mark.asyncio
async def test_an_answer_counts_though_the_engine_died_after_it() -> None:
    engine = DyingEngine()
    asking = asyncio.ensure_future(_ask_core(engine))
    await asyncio.sleep(0)
    engine.errored = True
    engine.question.set_result(3)
    assert await asking == 3


def test_a_rank_returns_what_it_raises_and_all_have_answered_when_it_is_told() -> None:
    from flexgate.server.engine.seam.engine import RankFailed, answered, answers

    @answered
    def halve(number: int) -> int:
        if number % 2:
            raise ValueError(f"{number} is odd")
        return number // 2

    assert answers([halve(2), halve(4)]) == [1, 2]
    with pytest.raises(RankFailed, match=r"^rank 1: ValueError: 3 is odd$"):
        answers([halve(2), halve(3), halve(5)])
