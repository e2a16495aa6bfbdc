"""`POST /v1/responses`, stateless: nothing is stored, so nothing can be asked for later."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, Final

from pydantic import BaseModel
from starlette.responses import JSONResponse

from flexgate.server.engine.seam.openai import ResponsesRequest
from flexgate.server.http.errors import ApiError
from flexgate.server.inference.decide import Kind
from flexgate.server.inference.openai import sse, vllm_errors
from flexgate.server.inference.openai.foreign import FOREIGN_IN_RESPONSES
from flexgate.server.inference.openai.serializers import PEER_FIELDS
from flexgate.server.inference.openai.vllm_errors import validated
from flexgate.server.inference.pipeline import Endpoint, Run
from flexgate.server.inference.request import fields, limits
from flexgate.server.inference.request.tools import check_tool_choice, forces_a_call

KIND = Kind("responses", fields.RESPONSES, limits.check_responses)
TERMINAL: Final = frozenset(["response.completed", "response.incomplete", "response.failed"])
_HIDDEN: Final = (*PEER_FIELDS, "input_messages", "output_messages")

logger = logging.getLogger(__name__)


async def _start(run: Run) -> Any:
    body = run.admitted.body
    check_tool_choice(body, has_parser=run.services.handlers.has_tool_parser)
    ours = {"request_id": f"resp_{run.request_id}", "store": False}
    request = await run.services.offload.run(validated, ResponsesRequest, {**body, **ours})
    handlers = run.services.handlers
    return await (handlers.forced_responses if forces_a_call(body) else handlers.responses).create_responses(request)


def _plain(run: Run, result: BaseModel) -> dict[str, Any]:  # noqa: ARG001 - one shape for all
    return _without_hidden(result.model_dump(mode="json", by_alias=True))


async def _stream(run: Run, result: AsyncIterator[BaseModel]) -> AsyncGenerator[str, None]:
    """vLLM's events by name, and its failures as the `error` event that clients expect."""
    sequence = 0
    try:
        async for event in result:
            payload = event.model_dump(mode="json", by_alias=True)
            sequence = payload.get("sequence_number", sequence)
            if "response" in payload:
                payload["response"] = _without_hidden(payload["response"])
            if payload["type"] in TERMINAL:
                payload["type"] = f"response.{payload['response']['status']}"  # vLLM calls every end 'completed'
                payload["response"]["flexgate"] = run.answer_object()
            yield sse.encode_named(payload)
    except Exception as error:
        logger.error("a Responses stream failed", exc_info=error)
        failed = run.error(vllm_errors.from_exception(error, run.admitted.body))
        yield sse.encode_named(_error_event(failed, sequence + 1))


def _error_event(error: ApiError, sequence: int) -> dict[str, Any]:
    told = error.body()["error"]
    return {
        "type": "error",
        "code": told["code"],
        "message": told["message"],
        "param": told["param"],
        "sequence_number": sequence,
    }


def _without_hidden(answer: dict[str, Any]) -> dict[str, Any]:
    """Without what nobody but vLLM's peers reads, and without null fields that only vLLM has."""
    hidden = {*_HIDDEN, *(name for name in FOREIGN_IN_RESPONSES if answer.get(name) is None)}
    return {name: value for name, value in answer.items() if name not in hidden}


ENDPOINT = Endpoint(
    KIND,
    needs_chat_template=True,
    start=_start,
    plain=_plain,
    stream=_stream,
    response=JSONResponse,  # it repeats the request's tools, whose schemas may have fields of any name
)
