"""`POST /v1/responses`, stateless: nothing is stored, so nothing can be fetched later."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterator
from operator import attrgetter
from typing import Any, Final

from pydantic import BaseModel
from starlette.responses import JSONResponse

from flexgate.server.engine.seam.openai import ResponsesRequest
from flexgate.server.http.errors import ApiError
from flexgate.server.inference.generation import cause, metadata
from flexgate.server.inference.openai import sse, vllm_errors
from flexgate.server.inference.openai.foreign import FOREIGN_IN_RESPONSES
from flexgate.server.inference.openai.serializers import PEER_FIELDS
from flexgate.server.inference.pipeline import Endpoint, InferenceRequest
from flexgate.server.inference.request import fields
from flexgate.server.inference.request.items import check_responses

TERMINAL: Final = frozenset(["response.completed", "response.incomplete", "response.failed"])
_HIDDEN: Final = (*PEER_FIELDS, "input_messages", "output_messages")

logger = logging.getLogger(__name__)


def _content(request: InferenceRequest, result: BaseModel) -> dict[str, Any]:  # noqa: ARG001 - one shape for all
    return _without_hidden(result.model_dump(mode="json", by_alias=True))


async def _stream(request: InferenceRequest, result: AsyncIterator[BaseModel]) -> AsyncGenerator[str, None]:
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
                payload["response"]["flexgate"] = metadata(request)
            yield sse.encode_named(payload)
    except Exception as error:
        logger.error("a Responses stream failed", exc_info=error)
        failed = cause(request, vllm_errors.from_exception(error, request.body))
        yield sse.encode_named(_error_event(failed, sequence + 1))


def _error_event(error: ApiError, sequence: int) -> dict[str, Any]:
    content = {"code": error.code, "message": str(error), "param": error.param}
    return {"type": "error", **content, "sequence_number": sequence}


def _without_hidden(response: dict[str, Any]) -> dict[str, Any]:
    """Drop fields for vLLM's own peers, and null fields that OpenAI does not have."""
    hidden = {*_HIDDEN, *(name for name in FOREIGN_IN_RESPONSES if response.get(name) is None)}
    return {name: value for name, value in response.items() if name not in hidden}


ENDPOINT: Final = Endpoint(
    fields.RESPONSES,
    check_responses,
    needs_chat_template=True,
    model=ResponsesRequest,
    handler=attrgetter("responses.create_responses"),
    forced=attrgetter("forced_responses.create_responses"),
    content=_content,
    stream=_stream,
    id_prefix="resp_",
    fixed={"store": False},
    response=JSONResponse,  # it repeats the request's tools, whose schemas may have fields of any name
)
