"""vLLM's OpenAI layer, as `server/inference` uses it: bodies, answers and errors. Written for vLLM 0.32.0.

``…Request``, ``…Response`` (vllm/entrypoints/openai/*/protocol.py, …/serve/tokenize/protocol.py)
    Public, but what fields they have changes with every release: `inference/request/fields.py` classifies each.
``ErrorInfo``, ``ErrorResponse``, ``create_error_response`` (vllm/entrypoints/serve)
    The shape of vLLM's own errors, which never leave as they are.
``VLLMValidationError`` (vllm/exceptions.py), ``SamplingParams`` (vllm/sampling_params.py)
    Public.
``grammar_is_likely_lark`` (vllm/v1/structured_output/utils.py)
    How vLLM tells two kinds of grammar apart; limits have to read a grammar as it will.
"""

from vllm.entrypoints.openai.chat_completion.protocol import (
    ChatCompletionRequest,
    ChatCompletionResponse,
    ChatCompletionStreamResponse,
)
from vllm.entrypoints.openai.completion.protocol import CompletionRequest, CompletionResponse, CompletionStreamResponse
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest, ResponsesResponse
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import ErrorInfo, ErrorResponse
from vllm.entrypoints.serve.tokenize.protocol import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeChatRequest,
    TokenizeCompletionRequest,
    TokenizeResponse,
)
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.v1.structured_output.utils import grammar_is_likely_lark

__all__ = [
    "ChatCompletionRequest",
    "ChatCompletionResponse",
    "ChatCompletionStreamResponse",
    "CompletionRequest",
    "CompletionResponse",
    "CompletionStreamResponse",
    "DetokenizeRequest",
    "DetokenizeResponse",
    "ErrorInfo",
    "ErrorResponse",
    "ResponsesRequest",
    "ResponsesResponse",
    "SamplingParams",
    "StructuredOutputsParams",
    "TokenizeChatRequest",
    "TokenizeCompletionRequest",
    "TokenizeResponse",
    "VLLMValidationError",
    "create_error_response",
    "grammar_is_likely_lark",
]
