"""Chat and completion responses as they are sent: vLLM's, without the fields for vLLM's own peers."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, Final

from pydantic import BaseModel

from flexgate.server.engine.seam.openai import ErrorResponse
from flexgate.server.inference.generation import cause, metadata
from flexgate.server.inference.openai import sse, vllm_errors
from flexgate.server.inference.pipeline import InferenceRequest

PEER_FIELDS: Final = ("kv_transfer_params", "ec_transfer_params")


def content(request: InferenceRequest, result: BaseModel) -> dict[str, Any]:
    """The body of a response that is not streamed."""
    response = result.model_dump()
    for name in PEER_FIELDS:
        response.pop(name, None)
    return _with_cached(request, response)


def events(request: InferenceRequest, result: AsyncIterator[str]) -> AsyncGenerator[str, None]:
    """The events of a streamed response."""
    options = request.body.get("stream_options") or {}

    def reshape(payload: dict[str, Any]) -> dict[str, Any]:
        error = vllm_errors.from_response(ErrorResponse.model_validate(payload), request.body)
        return cause(request, error).body()

    return sse.with_report(
        result,
        choices=request.body.get("n", 1) * len(request.body.get("prompt", (None,))),
        include_usage=bool(options.get("include_usage")),
        report=lambda chunk: _with_cached(request, {**chunk, "flexgate": metadata(request)}),
        reshape_error=reshape,
    )


def _with_cached(request: InferenceRequest, response: dict[str, Any]) -> dict[str, Any]:
    """Add up the cached tokens of all prompts: vLLM counts those of one."""
    usage = response.get("usage")
    if not usage:
        return response
    details = {**(usage.get("prompt_tokens_details") or {}), "cached_tokens": request.call.cached_tokens()}
    return {**response, "usage": {**usage, "prompt_tokens_details": details}}
