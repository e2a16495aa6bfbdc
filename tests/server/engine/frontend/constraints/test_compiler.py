"""Constraints are compiled elsewhere, within limits, each tenant in turn."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import time
from collections.abc import AsyncIterator
from typing import Any

import psutil
import pytest
import pytest_asyncio
import xgrammar
from maskkit import SECONDS, free_descriptors

from flexgate.server.engine.frontend.constraints import trials
from flexgate.server.engine.frontend.constraints.compiler import AVOIDED_SECONDS, MAX_WAITING, Compiler, CompilerBusy
from flexgate.server.engine.frontend.constraints.errors import ConstraintError
from flexgate.server.engine.frontend.constraints.made import Constraint
from flexgate.server.engine.frontend.constraints.schemas import enforceable
from flexgate.server.engine.frontend.constraints.trials import Trials
from flexgate.server.engine.frontend.constraints.worker import LENGTH
from flexgate.server.inference.openai.forced import calls

LONG = [b"ab" * 40, b"ba" * 40]  # what takes SLOW's masks longer than the limit, on any machine
TOKENIZER = xgrammar.TokenizerInfo([*(bytes([byte]) for byte in range(256)), *LONG, b"<end>"], stop_token_ids=[258])
EMAIL = Constraint("json", json.dumps({"type": "string", "pattern": "^[a-z]{1,64}@[a-z]{1,255}$"}))
SLOW = Constraint("regex", "(" + "|".join(["a?", *["a?b"] * 2500]) + "){1024}")
HUGE = Constraint("json", json.dumps({"type": "string", "pattern": ".{1,1000}" * 20}))


JOB = {"kind": EMAIL.kind, "text": EMAIL.text}


def process_of(compiler: Compiler) -> psutil.Process:
    """The process that tries constraints."""
    assert compiler._trials is not None
    return psutil.Process(compiler._trials.process.pid)


def answers_of(compiler: Compiler) -> str:
    """The pipe into which that process writes answers."""
    assert compiler._trials is not None
    transport: Any = compiler._trials.process._transport  # type: ignore[attr-defined]
    pipe = os.fstat(transport.get_pipe_transport(1).get_extra_info("pipe").fileno()).st_ino
    folder = f"/proc/{compiler._trials.process.pid}/fd"
    return next(f"{folder}/{name}" for name in os.listdir(folder) if os.stat(f"{folder}/{name}").st_ino == pipe)


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
    process = process_of(compiler)
    process.kill()
    await compiler._trials.process.wait()  # type: ignore[union-attr]
    await compiler.check("t", EMAIL)


@pytest.mark.asyncio
async def test_the_end_of_a_process_answers_nothing_that_another_was_asked() -> None:
    earlier, later = [await Trials.begin(TOKENIZER.serialize_json()) for _ in range(2)]
    try:
        psutil.Process(later.process.pid).suspend()
        asked = [asyncio.create_task(one.ask(JOB)) for one in (earlier, later)]
        await asyncio.sleep(0)
        earlier.process.kill()
        await earlier._listening
        assert not earlier.alive
        assert not asked[1].done()
        assert await asked[0] == await earlier.ask(JOB) == {"busy": "the process that compiles constraints ended"}
        psutil.Process(later.process.pid).resume()
        assert await asked[1] == {"id": 1}
    finally:
        for one in (earlier, later):
            await one.stop()


@pytest.mark.asyncio
async def test_a_process_that_answers_nonsense_is_ended_and_begun_again(compiler: Compiler) -> None:
    process = process_of(compiler)
    process.suspend()
    trying = asyncio.create_task(compiler.check("t", EMAIL))
    with open(answers_of(compiler), "wb", buffering=0) as sink:
        sink.write(LENGTH.pack(3) + b"{1}")
    async with asyncio.timeout(SECONDS):
        with pytest.raises(CompilerBusy):
            await trying
        await compiler.check("t", EMAIL)
    assert process_of(compiler).pid != process.pid
    assert not process.is_running()


@pytest.mark.asyncio
async def test_a_process_that_stands_still_is_ended_and_begun_again(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = process_of(compiler)
    process.suspend()
    monkeypatch.setattr(trials, "ANSWER_SECONDS", 0.01)
    async with asyncio.timeout(SECONDS):
        with pytest.raises(CompilerBusy):
            await compiler.check("t", EMAIL)
        monkeypatch.undo()
        await compiler.check("t", EMAIL)
    assert process_of(compiler).pid != process.pid


@pytest.mark.asyncio
@pytest.mark.parametrize("left", [1, 2], ids=["none for the pipe", "none to watch the child"])
async def test_a_trial_that_no_descriptor_is_left_for_can_be_made_later(compiler: Compiler, left: int) -> None:
    await compiler.check("t", EMAIL)
    process = process_of(compiler)
    limits = process.rlimit(psutil.RLIMIT_NOFILE)
    process.rlimit(psutil.RLIMIT_NOFILE, (free_descriptors(process)[left], limits[1]))
    try:
        with pytest.raises(CompilerBusy):
            await compiler.check("other", EMAIL)
    finally:
        process.rlimit(psutil.RLIMIT_NOFILE, limits)
    await compiler.check("other", EMAIL)
    assert process_of(compiler).pid == process.pid


@pytest.mark.asyncio
async def test_a_process_that_cannot_be_begun_is_no_fault_of_the_constraint(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    process_of(compiler).kill()
    await compiler._trials._listening  # type: ignore[union-attr]

    async def begin(_tokenizer: str) -> Trials:
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(Trials, "begin", begin)
    with pytest.raises(CompilerBusy, match="cannot be started"):
        await compiler.check("t", EMAIL)
    monkeypatch.undo()
    await compiler.check("t", EMAIL)


@pytest.mark.asyncio
async def test_what_ends_a_trial_from_outside_is_no_fault_of_the_constraint(compiler: Compiler) -> None:
    trying = asyncio.create_task(compiler.check("t", HUGE))
    process = process_of(compiler)
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
        assert "secret" not in process_of(begun).environ().values()
    finally:
        await begun.stop()
