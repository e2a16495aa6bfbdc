"""`POST /v1/chat/completions`."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from flexgate.server.inference.decide import Kind
from flexgate.server.inference.openai.choices import ChatRequest
from flexgate.server.inference.openai.serializers import plain_answer, stream_answer
from flexgate.server.inference.openai.vllm_errors import validated
from flexgate.server.inference.pipeline import Endpoint, Run
from flexgate.server.inference.request import fields, limits
from flexgate.server.inference.request.tools import check_tool_choice, forces_a_call

KIND = Kind("chat", fields.CHAT, limits.check_chat)


async def _start(run: Run) -> Any:
    body = run.admitted.body
    check_tool_choice(body, has_parser=run.services.handlers.has_tool_parser)
    request = await run.services.offload.run(validated, ChatRequest, {**body, "request_id": run.request_id})
    handlers = run.services.handlers
    return await (handlers.forced_chat if forces_a_call(body) else handlers.chat).create_chat_completion(request)


def _stream(run: Run, result: Any) -> AsyncGenerator[str, None]:
    return stream_answer(run, result, choices=run.admitted.body.get("n", 1))


ENDPOINT = Endpoint(KIND, needs_chat_template=True, start=_start, plain=plain_answer, stream=_stream)
