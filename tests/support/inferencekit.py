"""Requests for inference, and a completion as vLLM's handler gives it."""

from __future__ import annotations

from vllm.entrypoints.openai.completion.protocol import CompletionResponse, CompletionResponseChoice
from vllm.entrypoints.serve.engine.protocol import UsageInfo

PATH = "/v1/completions"
BODIES = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}]},
    "/v1/completions": {"prompt": "x"},
    "/v1/responses": {"input": "x"},
}


def completion() -> CompletionResponse:
    """With the field in which the engine core's usage rides."""
    return CompletionResponse(
        model="tiny",
        choices=[CompletionResponseChoice(index=0, text="hi")],
        usage=UsageInfo(),
        kv_transfer_params={"flexgate": [1, 2, 3]},
    )
