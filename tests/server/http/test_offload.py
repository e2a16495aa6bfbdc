"""What is made of a large body is made away from the event loop, whatever the door and the field."""

from __future__ import annotations

import asyncio
import itertools
import sys
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from pydantic import BaseModel

from flexgate.server.http import body
from flexgate.server.http.offload import ON_LOOP_BYTES, OPERATORS, PIECES_AT_ONCE, THREADS, Offload
from flexgate.server.inference import pipeline

TEXT = {"role": "user", "content": "hi"}
PART = {"type": "text", "text": "hi"}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
ITEM = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]}
Made = Callable[[int], dict[str, Any]]
DOORS: dict[str, tuple[str, Made]] = {
    "messages": ("/v1/chat/completions", lambda n: {"messages": [TEXT] * n}),
    "parts": ("/v1/chat/completions", lambda n: {"messages": [{"role": "user", "content": [PART] * n}]}),
    "calls": (
        "/v1/chat/completions",
        lambda n: {"messages": [TEXT, *[{"role": "assistant", "tool_calls": [CALL] * 100}] * (n // 100)]},
    ),
    "tools": ("/v1/chat/completions", lambda n: {"messages": [TEXT], "tools": [TOOL] * n}),
    "wide": ("/v1/chat/completions", lambda n: {"messages": [TEXT], "metadata": {f"k{i}": i for i in range(n)}}),
    "extension": (
        "/v1/chat/completions",
        lambda n: {"messages": [TEXT], "flexgate": {"experts": {f"e{i}": {"a": i} for i in range(n)}}},
    ),
    "schema": (
        "/v1/chat/completions",
        lambda n: {
            "messages": [TEXT],
            "response_format": {"type": "json_schema", "json_schema": {"schema": {f"p{i}": {} for i in range(n)}}},
        },
    ),
    "texts": ("/v1/completions", lambda n: {"prompt": ["a"] * n}),
    "ids": ("/v1/completions", lambda n: {"prompt": [7] * n}),
    "lists of ids": ("/v1/completions", lambda n: {"prompt": [[7]] * n}),
    "items": ("/v1/responses", lambda n: {"input": [ITEM] * n}),
    "tokenize": ("/tokenize", lambda n: {"messages": [TEXT] * n}),
    "tokens": ("/detokenize", lambda n: {"tokens": [7] * n}),
    "policy": ("/v1/policy/simulate", lambda n: {"policy": {"tenants": [{"id": f"t{i}"} for i in range(n)]}}),
    "wrong members": ("/v1/policy/simulate", lambda n: {"policy": {"hidden_experts": [7] * n}}),
}


@pytest.fixture
def ask(make_client: Callable[..., httpx.AsyncClient], handler: Any) -> Callable[..., Any]:
    async def ask(path: str, made: dict[str, Any]) -> int:
        handler.result = SimpleNamespace(model_dump=dict) if "tokenize" in path else None
        async with make_client("sk-admin" if path.startswith("/v1/policy") else "sk-t") as http:
            return (await http.post(path, json=made)).status_code

    return ask


async def _calls_on_this_thread(work: Any) -> int:
    """How many calls, of Python functions and of native ones, this thread makes until `work` is done."""
    calls = 0

    def count(_frame: Any, event: str, _argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        await work
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.asyncio
@pytest.mark.parametrize("door", DOORS)
async def test_the_loops_work_does_not_grow_with_the_body(ask: Any, door: str) -> None:
    path, make = DOORS[door]
    await ask(path, make(2000))  # what is done once
    few, many = [await _calls_on_this_thread(ask(path, make(n))) for n in (2000, 8000)]
    assert many < few + 1000, f"{many - few} more calls for 6000 more {door}"


@pytest.mark.asyncio
async def test_small_and_large_bodies_take_one_way_on_two_threads(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: dict[str, int] = {}

    def spy(owner: Any, name: str) -> None:
        plain = getattr(owner, name)

        def seen(*args: Any, **options: Any) -> Any:
            threads[name] = threading.get_ident()
            return plain(*args, **options)

        monkeypatch.setattr(owner, name, seen)

    for owner, name in ((body, "parse_object"), (pipeline, "parse_extension"), (BaseModel, "model_validate")):
        spy(owner, name)
    here = threading.get_ident()
    for text, on_loop in (("a", True), ("a" * ON_LOOP_BYTES, False)):
        threads.clear()
        await ask("/v1/chat/completions", {"messages": [TEXT | {"content": text}], "flexgate": {}})
        assert set(threads) == {"parse_object", "parse_extension", "model_validate"}
        assert all((thread == here) is on_loop for thread in threads.values()), threads


@pytest.mark.asyncio
async def test_prompts_of_large_bodies_are_rendered_off_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    from flexgate.server.inference.openai import handlers

    async def render(*_: Any) -> int:
        await asyncio.sleep(0)
        return threading.get_ident()

    for name in ("render_chat", "render_responses", "render_completion"):
        monkeypatch.setattr(handlers.OnlineRenderer, name, render)
        offload = Offload()
        renderer = handlers.OffloadedRenderer.__new__(handlers.OffloadedRenderer)
        renderer._offload = offload
        offload.arrived(ON_LOOP_BYTES, "t")
        assert await getattr(renderer, name)() == threading.get_ident()
        offload.arrived(ON_LOOP_BYTES + 1, "t")
        assert await getattr(renderer, name)() != threading.get_ident()


@pytest.mark.asyncio
async def test_a_projects_large_bodies_wait_for_one_another_and_for_nobody_elses() -> None:
    offload, go, under_way = Offload(), threading.Event(), 0

    async def heavy(owner: str, work: Callable[[], Any]) -> Any:
        offload.arrived(ON_LOOP_BYTES + 1, owner)
        return await offload.run(work)

    def wait() -> None:
        nonlocal under_way
        under_way += 1
        assert go.wait(20)

    waiting = [asyncio.create_task(heavy("busy", wait)) for _ in range(20)]
    assert await asyncio.wait_for(asyncio.create_task(heavy("other", lambda: 7)), 20) == 7
    assert under_way == 1
    for task in waiting[:15]:  # clients that leave do not let more of their work begin
        task.cancel()
    assert await asyncio.wait_for(asyncio.create_task(heavy("other", lambda: 8)), 20) == 8
    assert under_way == 1
    go.set()
    await asyncio.gather(*waiting, return_exceptions=True)
    assert under_way == 6


@pytest.mark.asyncio
async def test_what_work_raises_is_raised_to_who_asked_and_its_lane_is_free() -> None:
    offload = Offload()
    offload.arrived(ON_LOOP_BYTES + 1, "t")
    with pytest.raises(ValueError, match="broken"):
        await offload.run(int, "broken")
    assert await offload.run(lambda: 1) == 1


@pytest.mark.asyncio
async def test_of_many_requests_that_come_together_few_are_worked_on_before_what_comes_next() -> None:
    offload, begun = Offload(), 0

    def work() -> None:
        nonlocal begun
        begun += 1

    async def small(run: Any, work: Any) -> None:
        offload.arrived(1, "t")
        await run(work)

    async def waiting_work() -> None:
        work()

    many = [
        asyncio.create_task(small(*pair))
        for pair in ((offload.run, work), (offload.run, waiting_work))
        for _ in range(500)
    ]
    passes = [0]
    while begun < len(many):
        await asyncio.sleep(0)
        passes.append(begun)
    assert max(after - before for before, after in itertools.pairwise(passes)) <= PIECES_AT_ONCE
    await asyncio.gather(*many)


class Number(BaseModel):
    number: int


@pytest.mark.asyncio
async def test_what_is_wrong_with_a_large_body_is_told_and_freed_off_the_loop(
    ask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flexgate.server.http import validation
    from flexgate.server.inference.openai import vllm_errors

    threads: list[int] = []

    def spied(plain: Callable[..., Any]) -> Callable[..., Any]:
        def seen(*args: Any) -> Any:
            threads.append(threading.get_ident())
            return plain(*args)

        return seen

    for module, name in ((validation, "from_validation"), (vllm_errors, "_from_validation")):
        monkeypatch.setattr(module, name, spied(getattr(module, name)))
    long = "a" * ON_LOOP_BYTES
    assert await ask("/v1/policy/simulate", {"policy": {"tenants": long}}) == 400
    assert await ask("/v1/responses", {"input": long, "include": [7]}) == 400
    assert await ask("/v1/chat/completions", {"messages": [TEXT], "user": long, "temperature": [long]}) == 400
    assert await ask("/v1/completions", {"prompt": long, "temperature": [7]}) == 400
    assert len(threads) == 4
    assert threading.get_ident() not in threads


@pytest.mark.asyncio
async def test_a_refusal_leaves_what_it_came_from_behind_and_a_fault_of_the_server_keeps_its_cause() -> None:
    from flexgate.server.http.errors import ApiError, Invalid

    def refuse(error: type[ApiError]) -> None:
        try:
            Number.model_validate({"number": "x"})
        except ValueError as cause:
            raise error("no", **({} if error is ApiError else {"param": None, "code": "c"})) from cause

    offload = Offload()
    offload.arrived(ON_LOOP_BYTES + 1, "t")
    with pytest.raises(Invalid) as refused:
        await offload.run(refuse, Invalid)
    assert (refused.value.__cause__, refused.value.__context__) == (None, None)
    assert "refuse" not in {frame.name for frame in refused.traceback}
    with pytest.raises(ApiError) as failed:
        await offload.run(refuse, ApiError)
    assert isinstance(failed.value.__cause__, ValueError)


def test_no_list_of_a_body_tells_of_more_than_its_first_wrong_member() -> None:
    from flexgate.server.admin.operations import OPERATIONS
    from flexgate.server.inference.request.extension import Extension

    def lists(schema: Any) -> Any:
        if isinstance(schema, dict):
            if schema.get("type") in ("list", "set", "frozenset", "tuple"):
                yield schema
            for name, part in schema.items():
                yield from () if name == "metadata" else lists(part)
        elif isinstance(schema, list | tuple):
            for part in schema:
                yield from lists(part)

    models = {*(operation.body for operation in OPERATIONS), Extension}
    found = [one for model in models for one in lists(model.__pydantic_core_schema__)]
    assert len(found) > 20
    assert all(one.get("fail_fast") for one in found)


@pytest.mark.asyncio
async def test_what_operators_send_waits_for_no_tenants_bodies(
    ask: Any, services: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    offload, go, begun = services.offload, threading.Event(), threading.Semaphore(0)

    def hold() -> None:
        begun.release()
        assert go.wait(20)

    held = [asyncio.create_task(offload.run_for(f"t{number}", hold)) for number in range(THREADS + 5)]
    for _ in range(THREADS):
        assert await asyncio.to_thread(begun.acquire, timeout=20)
    monkeypatch.setattr(offload, "_begun", ["t"] * PIECES_AT_ONCE)  # a pass of the loop that does not end
    try:
        for text in ("a" * ON_LOOP_BYTES, "a"):
            assert await asyncio.wait_for(ask("/v1/policy/simulate", {"policy": {"tenants": text}}), 10) == 400
    finally:
        go.set()
        await asyncio.gather(*held)


@pytest.mark.asyncio
async def test_only_administrators_bodies_are_operators(ask: Any, services: Any) -> None:
    owners: list[str] = []
    arrived = services.offload.arrived
    services.offload.arrived = lambda size, owner: (owners.append(owner), arrived(size, owner))
    await ask("/v1/policy/simulate", {})
    await ask("/v1/completions", {"temperature": "x"})
    assert owners[0] == OPERATORS
    assert OPERATORS not in owners[1:]
