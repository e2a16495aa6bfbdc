"""What vLLM's handlers raise, return or stream as an error has this server's shape."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from inferencekit import BODIES, PATH
from vllm.entrypoints.serve import create_error_response
from vllm.exceptions import GenerationError, QueueOverflowError, VLLMValidationError

from flexgate.server.engine.frontend.calls import GatedCall
from flexgate.server.engine.protocol.endings import (
    CONSTRAINT_BUSY,
    CONSTRAINT_SLOW,
    CONSTRAINT_UNAVAILABLE,
    GATE_EXPIRED,
    KEY_EXPIRED,
    KEY_REVOKED,
    NUMBERS_OVERFLOWED,
    POLICY_UNAVAILABLE,
    PROJECT_ARCHIVED,
    QUEUED_TOO_LONG,
)
from flexgate.server.http.auth import KeyExpired, KeyRevoked, KeyWrong, Unauthenticated
from flexgate.server.inference.openai.vllm_errors import ended_early


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("error", "status", "param"),
    [
        (VLLMValidationError("bad", parameter="top_p", value="secret"), 400, "top_p"),
        (ValueError("bad"), 400, None),
        (QueueOverflowError(), 503, None),
        (GenerationError(), 500, None),
        (RuntimeError("inside"), 500, None),
        (create_error_response("bad", param="prompt"), 400, "prompt"),
        (
            create_error_response("inside", status_code=__import__("http").HTTPStatus(500)),
            500,
            None,
        ),
    ],
)
async def test_vllms_errors_have_this_servers_shape(
    client: httpx.AsyncClient, handler: Any, error: Any, status: int, param: str | None
) -> None:
    handler.result = error
    response = await client.post(PATH, json={"prompt": "x"})
    assert response.status_code == status
    said = response.json()["error"]
    assert said.keys() == {"message", "type", "param", "code"}
    assert said["param"] == param
    assert said["code"] is None or isinstance(said["code"], str)
    assert "inside" not in said["message"]
    assert "secret" not in said["message"]


@pytest.mark.asyncio
async def test_a_constraint_that_cannot_be_met_is_the_callers_mistake(
    client: httpx.AsyncClient, handler: Any, services: Any
) -> None:
    handler.result = GenerationError()
    body = {"prompt": "x", "structured_outputs": {"grammar": "root ::="}}
    response = await client.post(PATH, json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "structured_outputs")
    services.client.errored = True
    assert (await client.post(PATH, json=body)).status_code == 500


@pytest.mark.asyncio
async def test_a_gate_that_ended_meanwhile_is_told(client: httpx.AsyncClient, handler: Any) -> None:
    def expire() -> None:
        handler.calls[-1].failed = GATE_EXPIRED
        raise GenerationError

    handler.result = expire
    response = await client.post(PATH, json={"prompt": "x"})
    assert response.status_code == 403
    assert response.json()["error"]["code"] == "expert_permission_ended"


@pytest.mark.asyncio
@pytest.mark.parametrize(("reason", "again"), [(QUEUED_TOO_LONG, "60"), (POLICY_UNAVAILABLE, "1")])
async def test_who_waited_in_vain_is_told_when_to_try_again(
    client: httpx.AsyncClient, handler: Any, reason: str, again: str
) -> None:
    def wait() -> None:
        handler.calls[-1].failed = reason
        raise GenerationError

    handler.result = wait
    response = await client.post(PATH, json={"prompt": "x"})
    assert (response.status_code, response.headers["retry-after"]) == (503, again)
    assert response.json()["error"]["code"] == reason


@pytest.mark.asyncio
@pytest.mark.parametrize("stream", [False, True])
async def test_numbers_that_overflowed_are_told_and_not_to_be_tried_again(
    client: httpx.AsyncClient, handler: Any, stream: bool
) -> None:
    async def events() -> AsyncIterator[str]:
        handler.calls[-1].failed = NUMBERS_OVERFLOWED
        yield f"data: {json.dumps(create_error_response(GenerationError()).model_dump())}\n\n"
        yield "data: [DONE]\n\n"

    def overflow() -> Any:
        if stream:
            return events()
        handler.calls[-1].failed = NUMBERS_OVERFLOWED
        raise GenerationError

    handler.result = overflow
    body = {"prompt": "x", "stream": stream, "structured_outputs": {"regex": "a"}}
    response = await client.post(PATH, json=body)
    if stream:
        said = json.loads(response.text.split("\n\n")[0].removeprefix("data: "))["error"]
    else:
        assert (response.status_code, response.headers["x-should-retry"]) == (500, "false")
        said = response.json()["error"]
    assert (said["type"], said["code"], said["param"]) == ("server_error", "numbers_overflowed", None)


@pytest.mark.asyncio
async def test_an_error_in_a_stream_has_this_servers_shape(client: httpx.AsyncClient, handler: Any) -> None:
    error = json.dumps(create_error_response(RuntimeError("inside")).model_dump())

    async def events() -> AsyncIterator[str]:
        yield f"data: {error}\n\n"
        yield "data: [DONE]\n\n"

    handler.result = events
    response = await client.post(PATH, json={"prompt": "x", "stream": True})
    first = json.loads(response.text.split("\n\n")[0].removeprefix("data: "))
    assert first["error"].keys() == {"message", "type", "param", "code"}
    assert first["error"]["type"] == "server_error"
    assert "inside" not in response.text


@pytest.mark.asyncio
async def test_a_failed_responses_stream_ends_with_an_error_event(client: httpx.AsyncClient, handler: Any) -> None:
    async def events() -> AsyncIterator[Any]:
        raise GenerationError
        yield

    handler.result = events
    response = await client.post("/v1/responses", json={"input": "x", "stream": True})
    name, data = response.text.strip().split("\n")
    assert name == "event: error"
    payload = json.loads(data.removeprefix("data: "))
    assert (payload["type"], payload["code"]) == ("error", "internal_error")


TOO_LONG = VLLMValidationError("your prompt contains 9 input tokens", parameter="input_tokens", value=9)
LONG_TEXT = VLLMValidationError("your prompt contains 99 characters", parameter="input_text", value=99)
FILLED = VLLMValidationError("max_tokens must be at least 1, got 0.", parameter="max_tokens", value=0)


@pytest.mark.asyncio
@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("error", [TOO_LONG, LONG_TEXT, FILLED])
async def test_a_prompt_too_long_is_told_by_openais_code_and_the_requests_own_field(
    client: httpx.AsyncClient, handler: Any, path: str, error: Exception
) -> None:
    handler.result = error
    response = await client.post(path, json=BODIES[path])
    said = response.json()["error"]
    (field,) = BODIES[path]
    assert (response.status_code, said["code"], said["param"]) == (400, "context_length_exceeded", field)
    assert said["message"].startswith("The prompt is too long: ")  # LangChain looks for these words
    if error is FILLED:
        assert said["message"] == (
            f"The prompt is too long: '{field}' takes all tokens of this model's context: none is left for an answer. "
            "Shorten it by at least one token."
        )


@pytest.mark.parametrize(
    ("ending", "refusal"), [(KEY_REVOKED, KeyRevoked), (KEY_EXPIRED, KeyExpired), (PROJECT_ARCHIVED, KeyWrong)]
)
def test_a_key_that_is_good_no_more_has_one_code_before_and_while_a_request_runs(
    ending: str, refusal: type[Unauthenticated]
) -> None:
    before, ended = refusal("no"), ended_early(GatedCall("t", (), 0.0, failed=ending))
    assert ended is not None
    assert (ended.status, ended.code, ended.headers) == (before.status, before.code, before.headers)


@pytest.mark.asyncio
async def test_a_constraint_refused_in_a_stream_is_refused_as_before_one(
    client: httpx.AsyncClient, handler: Any
) -> None:
    refused = VLLMValidationError("The answer cannot be constrained as asked: it is too large.")
    body = {"prompt": "x", "structured_outputs": {"regex": "a"}}
    handler.result = refused
    before = (await client.post(PATH, json=body)).json()

    async def events() -> AsyncIterator[str]:
        yield f"data: {json.dumps(create_error_response(refused).model_dump())}\n\n"
        yield "data: [DONE]\n\n"

    handler.result = events
    response = await client.post(PATH, json={**body, "stream": True})
    assert json.loads(response.text.split("\n\n")[0].removeprefix("data: ")) == before
    assert before["error"]["code"] == "invalid_value"
    assert before["error"]["param"] == "structured_outputs"


@pytest.mark.parametrize(
    ("ending", "status", "code"),
    [
        (CONSTRAINT_SLOW, 400, "constraint_too_slow"),
        (CONSTRAINT_BUSY, 503, "constraint_busy"),
        (CONSTRAINT_UNAVAILABLE, 503, "constraint_unavailable"),
    ],
)
def test_a_fault_of_the_server_is_told_as_one_and_a_slow_constraint_is_not(ending: str, status: int, code: str) -> None:
    ended = ended_early(GatedCall("t", (), 0.0, failed=ending))
    assert ended is not None
    assert (ended.status, ended.code) == (status, code)
    assert ended.headers.get("retry-after") == ("1" if status == 503 else None)
