"""vLLM's OpenAI handlers and what they are built with. Written for vLLM 0.32.0.

``OpenAIServing…``, ``ServingTokenization``, ``OnlineRenderer``, ``BaseModelPath`` (vllm/entrypoints, vllm/renderers)
    Not documented to be built by others: vLLM's own server builds them. Kept apart from the bodies, since loading them
    takes seconds.
``ToolParserManager``, ``ToolParser`` (vllm/tool_parsers)
    Public: how a tool parser is registered.
"""

from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
from vllm.entrypoints.serve.tokenize.serving import ServingTokenization
from vllm.renderers.online_renderer import OnlineRenderer
from vllm.tool_parsers import ToolParserManager
from vllm.tool_parsers.abstract_tool_parser import ToolParser

__all__ = [
    "BaseModelPath",
    "OnlineRenderer",
    "OpenAIServingChat",
    "OpenAIServingCompletion",
    "OpenAIServingModels",
    "OpenAIServingResponses",
    "ServingTokenization",
    "ToolParser",
    "ToolParserManager",
]
