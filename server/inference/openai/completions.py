"""`POST /v1/completions`."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from flexgate.server.inference.decide import Kind
from flexgate.server.inference.openai.choices import TextRequest
from flexgate.server.inference.openai.serializers import plain_answer, stream_answer
from flexgate.server.inference.openai.vllm_errors import validated
from flexgate.server.inference.pipeline import Endpoint, Run
from flexgate.server.inference.request import fields, limits

KIND = Kind("completion", fields.COMPLETION, limits.check_completion)


async def _start(run: Run) -> Any:
    body = {**run.admitted.body, "request_id": run.request_id}
    request = await run.services.offload.run(validated, TextRequest, body)
    run.call.prompt_only = request.max_tokens == 0
    return await run.services.handlers.completion.create_completion(request)


def _stream(run: Run, result: Any) -> AsyncGenerator[str, None]:
    body = run.admitted.body
    return stream_answer(run, result, choices=body.get("n", 1) * len(body["prompt"]))


ENDPOINT = Endpoint(KIND, needs_chat_template=False, start=_start, plain=plain_answer, stream=_stream)
