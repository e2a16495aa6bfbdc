"""Short constraints that stand for huge automata: each costs little, and the engine lives on."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import httpx
import pytest
from processor_time import ProcessorTime

pytestmark = pytest.mark.engine

SECONDS = 15
"""Of processor time: twice what compiling may use, and one slow mask. Other projects have the rest."""
PATIENCE_SECONDS = 300


def nested_arrays(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "minItems": 512, "maxItems": 1024, "items": schema}
    return schema


def wide_object(width: int) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(width)}}


def fanned_references(width: int) -> dict[str, Any]:
    """Expands to ``width`` to the fourth; the pattern property is one that vLLM's usual backends do not know."""
    schema: dict[str, Any] = {"anyOf": [{"$ref": "#/0"}], "3": {"anyOf": [{"type": "null"}] * width}}
    for level in range(3):
        schema[str(level)] = {"anyOf": [{"$ref": f"#/{level + 1}"}] * width}
    return schema | {"t": {"type": "object", "properties": {}, "patternProperties": {"a": {}}}}


BOMBS: dict[str, dict[str, Any]] = {
    "arrays in arrays": {"json": nested_arrays(20)},
    "long string": {"json": {"type": "string", "minLength": 1024, "maxLength": 1024}},
    "wide object": {"json": wide_object(300)},
    "many objects": {"json": {"anyOf": [wide_object(20)] * 20}},
    "endless reference": {"json": {"$ref": "#"}},
    "reference to elsewhere": {"json": {"$ref": "http://127.0.0.1:9/schema"}},
    "backtracking pattern": {"json": {"patternProperties": {"^(a+)+$": {"type": "integer"}}}},
    "repeats in repeats": {"regex": "((a{1,1000}){1,1000}){1,1000}"},
    "choices in repeats": {"regex": "(a|b|ab)*c{500}(x|y){500}"},
    "long window": {"regex": ".*a.{500}"},
    "grammar repeats": {"grammar": 'root ::= a{1,1000}\na ::= b{1,1000}\nb ::= "x"{1,1000}'},
    "left recursion": {"grammar": 'root ::= root "a" | "b"'},
    "ambiguity": {"grammar": 'root ::= a a a a a a\na ::= "x" | a a | ""'},
    "spaces in a quantifier": {"regex": "{" + " " * 5000 + "," + " " * 11000},
    "spaces in a quantifier of a schema": {"json": {"type": "string", "pattern": "{" + " " * 4000 + "," + " " * 12000}},
    "references to references": {"json": fanned_references(40)},
    "repeats in Lark": {"grammar": 'start: "a"~2000000000'},
    "schema in Lark": {"grammar": 'start: %json {"type": "array", "minItems": 900000, "items": {"type": "integer"}}'},
    "huge pattern": {"json": {"type": "string", "pattern": ".{1,1000}" * 4}},
    "slow masks": {"regex": "(" + "|".join(["a?", *["a?b"] * 2500]) + "){1024}"},
    "masks that are slow later": {"regex": "x{300}(" + "|".join(["a?", *["a?b"] * 400]) + "){512}"},
    "many choices": {"choice": [str(number) for number in range(3000)]},
}


async def ask(server: Any, path: str, *bodies: dict[str, Any]) -> list[int]:
    """The statuses of requests, one after another, given up once the server has used ``SECONDS`` for all of them."""
    headers = {"authorization": f"Bearer {server.key('all')}"}
    async with httpx.AsyncClient(base_url=server.url, headers=headers, timeout=PATIENCE_SECONDS) as http:

        async def send() -> list[int]:
            return [(await http.post(path, json=body)).status_code for body in bodies]

        used, sending = ProcessorTime(server.process.pid), asyncio.create_task(send())
        try:
            while not sending.done():
                await asyncio.wait([sending], timeout=0.1)
                assert used.seconds() < SECONDS
        finally:
            sending.cancel()
        return await sending


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_costs_little_and_the_next_request_is_answered(server: Any, name: str) -> None:
    body = {"prompt": "a", "max_tokens": 3, "structured_outputs": BOMBS[name]}
    # It did not choose another way to constrain answers, which not all constraints would fit.
    choice = {"prompt": "a", "max_tokens": 1, "structured_outputs": {"choice": ["a", "b"]}}
    first, second = asyncio.run(ask(server, "/v1/completions", body, choice))
    assert first in (200, 400)
    assert second == 200


@pytest.mark.parametrize(("max_tokens", "temperature"), [(3, 0), (3, 1), (1, 0), (1, 1)])
def test_a_constraint_that_other_parameters_leave_nothing_ends_its_request_alone(
    server: Any, max_tokens: int, temperature: int
) -> None:
    only = {"regex": "a{5}"}
    body = {"prompt": "a", "max_tokens": max_tokens, "temperature": temperature, "structured_outputs": only}
    with server.client() as http:
        refused = http.post("/v1/completions", json={**body, "bad_words": ["a", "aa", "aaa", "aaaa", "aaaaa"]})
        answered = http.post("/v1/completions", json=body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "constraint_failed")
    assert answered.status_code == 200
    assert set(answered.json()["choices"][0]["text"]) == {"a"}


def test_thousands_of_tools_are_refused_and_many_cost_little(server: Any) -> None:
    def tools(count: int) -> list[dict[str, Any]]:
        return [{"type": "function", "function": {"name": f"{'n' * 59}{number:05}"}} for number in range(count)]

    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 3, "tool_choice": "required"}
    bodies = [{**body, "tools": tools(count)} for count in (8000, 128)]
    assert asyncio.run(ask(server, "/v1/chat/completions", *bodies)) == [400, 200]


def test_a_client_that_leaves_a_stream_stops_its_generation(server: Any) -> None:
    body = {"prompt": "a", "max_tokens": 900, "ignore_eos": True, "stream": True}
    with server.client() as http, http.stream("POST", "/v1/completions", json=body) as response:
        next(response.iter_lines())
    deadline = time.monotonic() + PATIENCE_SECONDS
    while running(server) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert running(server) == 0


def running(server: Any) -> float:
    """Requests in the engine, as vLLM counts them."""
    with server.client("auditor") as http:
        http.get("/health")
        lines = http.get("/metrics").text.splitlines()
    gauges = [line for line in lines if line.startswith("vllm:num_requests_running{")]
    return sum(float(line.split()[-1]) for line in gauges)
