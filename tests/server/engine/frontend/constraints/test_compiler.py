"""Constraints are compiled elsewhere, within limits, each tenant in turn."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator
from typing import Any

import psutil
import pytest
import pytest_asyncio
import xgrammar

from flexgate.server.engine.frontend.constraints.compiler import AVOIDED_SECONDS, MAX_WAITING, Compiler, CompilerBusy
from flexgate.server.engine.frontend.constraints.errors import ConstraintError
from flexgate.server.engine.frontend.constraints.made import Constraint
from flexgate.server.engine.frontend.constraints.schemas import enforceable
from flexgate.server.inference.openai.forced import calls

LONG = [b"ab" * 40, b"ba" * 40]  # what takes SLOW's masks longer than the limit, on any machine
TOKENIZER = xgrammar.TokenizerInfo([*(bytes([byte]) for byte in range(256)), *LONG, b"<end>"], stop_token_ids=[258])
EMAIL = Constraint("json", json.dumps({"type": "string", "pattern": "^[a-z]{1,64}@[a-z]{1,255}$"}))
SLOW = Constraint("regex", "(" + "|".join(["a?", *["a?b"] * 2500]) + "){1024}")
HUGE = Constraint("json", json.dumps({"type": "string", "pattern": ".{1,1000}" * 20}))


@pytest_asyncio.fixture
async def compiler() -> AsyncIterator[Compiler]:
    begun = Compiler()
    await begun.start(TOKENIZER.serialize_json())
    yield begun
    await begun.stop()


@pytest.mark.asyncio
async def test_an_ordinary_pattern_may_be_followed(compiler: Compiler) -> None:
    await compiler.check("t", EMAIL)


@pytest.mark.asyncio
async def test_as_many_tools_as_may_be_named_may_be_forced(compiler: Compiler) -> None:
    parameters = {"type": "object", "properties": {"query": {"type": "string"}, "n": {"type": "integer"}}}
    forced = calls({f"{'n' * 59}{number:05}": parameters for number in range(128)}, parallel=True)
    await compiler.check("t", Constraint("json", json.dumps(enforceable(forced))))


@pytest.mark.asyncio
@pytest.mark.parametrize("bomb", [SLOW, HUGE], ids=["slow masks", "huge pattern"])
async def test_a_bomb_ends_alone_and_for_a_reason_while_the_loop_goes_on(compiler: Compiler, bomb: Constraint) -> None:
    began = time.thread_time()
    bombing = asyncio.create_task(compiler.check("bomber", bomb))
    await compiler.check("other", EMAIL)
    with pytest.raises(ConstraintError) as refused:
        await bombing
    assert any(why in str(refused.value) for why in ("too long", "takes more than", "needs more than"))
    assert time.thread_time() - began < 1  # compiled on the loop, it takes several


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", ["regex", "grammar", "json"])
async def test_what_the_compiler_cannot_read_is_said_without_its_paths(compiler: Compiler, kind: str) -> None:
    text = {"regex": "(a", "grammar": "root ::= ", "json": '{"type": "integer", "minimum": 5, "maximum": 3}'}[kind]
    with pytest.raises(ConstraintError) as refused:
        await compiler.check("t", Constraint(kind, text))
    said = str(refused.value)
    assert said
    assert not any(part in said for part in ("/", ".cc", "::", "[2"))


@pytest.mark.asyncio
async def test_one_tenant_waits_for_itself_and_no_other_for_it(compiler: Compiler) -> None:
    flood = [Constraint("regex", SLOW.text + str(number)) for number in range(MAX_WAITING)]
    waiting = [asyncio.create_task(compiler.check("flooder", one)) for one in flood]
    await asyncio.sleep(0)
    with pytest.raises(CompilerBusy):
        await compiler.check("flooder", EMAIL)
    await compiler.check("other", EMAIL)
    assert not all(task.done() for task in waiting)
    for task in waiting:
        task.cancel()


@pytest.mark.asyncio
async def test_what_was_tried_is_remembered_for_its_tenant_alone(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    await compiler.check("t", EMAIL)

    async def refuse(_job: dict[str, Any]) -> dict[str, Any]:
        return {"refused": "asked again"}

    monkeypatch.setattr(compiler, "_ask", refuse)
    await compiler.check("t", EMAIL)
    with pytest.raises(ConstraintError, match="asked again"):
        await compiler.check("other", EMAIL)


@pytest.mark.asyncio
async def test_the_process_is_begun_again_when_it_was_killed(compiler: Compiler) -> None:
    assert compiler._process is not None
    os.kill(compiler._process.pid, signal.SIGKILL)
    await compiler._process.wait()
    await compiler.check("t", EMAIL)


@pytest.mark.asyncio
async def test_what_ends_a_trial_from_outside_is_no_fault_of_the_constraint(compiler: Compiler) -> None:
    trying = asyncio.create_task(compiler.check("t", HUGE))
    assert compiler._process is not None
    process = psutil.Process(compiler._process.pid)
    while not (children := process.children()):
        assert not trying.done()
        await asyncio.sleep(0.001)
    children[0].kill()
    with pytest.raises(CompilerBusy):
        await trying


@pytest.mark.asyncio
async def test_what_was_slow_to_follow_is_refused_to_its_tenant_for_a_while(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    await compiler.check("t", EMAIL)
    compiler.avoid("t", EMAIL)
    with pytest.raises(ConstraintError, match="took too long to follow"):
        await compiler.check("t", EMAIL)
    await compiler.check("other", EMAIL)
    now = time.monotonic() + AVOIDED_SECONDS
    monkeypatch.setattr("flexgate.server.engine.frontend.constraints.compiler.time.monotonic", lambda: now)
    await compiler.check("t", EMAIL)


@pytest.mark.asyncio
async def test_the_process_has_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FLEXGATE_SEAL_KEY", "FLEXGATE_DATABASE_URL", "ANY_SECRET"):
        monkeypatch.setenv(name, "secret")
    begun = Compiler()
    await begun.start(TOKENIZER.serialize_json())
    try:
        await begun.check("t", EMAIL)
        assert begun._process is not None
        assert "secret" not in psutil.Process(begun._process.pid).environ().values()
    finally:
        await begun.stop()
