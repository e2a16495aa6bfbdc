"""vLLM's own OpenAI handlers, built around the gated client and nothing else of vLLM's server.

vLLM's FastAPI app, its routes, its middleware and its state are not used: what is served is what
`flexgate.server.lifecycle.app` lists. The handlers get no HTTP request, so that no header reaches them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from flexgate.server.engine.frontend.tokenizer import template_problem
from flexgate.server.engine.seam.handlers import (
    BaseModelPath,
    OnlineRenderer,
    OpenAIServingChat,
    OpenAIServingCompletion,
    OpenAIServingModels,
    OpenAIServingResponses,
    ServingTokenization,
    ToolParserManager,
)
from flexgate.server.http.offload import Offload
from flexgate.server.inference.errors import HandlersRefused
from flexgate.server.inference.openai.adapted import LaterChat, LaterCompletion, LaterResponses, OffloadedRenderer
from flexgate.server.inference.openai.forced import ConstrainedToolParser, read_cut_lists

if TYPE_CHECKING:
    from flexgate.server.engine.frontend.client import GatedEngineClient

CONSTRAINED_PARSER: Final = "flexgate_constrained"


@dataclass(frozen=True, slots=True)
class Handlers:
    """vLLM's handlers, and what validation must know about them.

    Attributes:
        forced_chat, forced_responses: for choices that force a call, whose JSON constrained decoding ensures. A
            parser with a format of its own would leave the arguments of most tools unconstrained.
    """

    chat: OpenAIServingChat
    forced_chat: OpenAIServingChat
    completion: OpenAIServingCompletion
    responses: OpenAIServingResponses
    forced_responses: OpenAIServingResponses
    tokenization: ServingTokenization
    has_chat_template: bool


def build_handlers(
    client: GatedEngineClient,
    offload: Offload,
    *,
    model_names: Sequence[str],
    chat_template: Path | None,
    tool_call_parser: str | None,
) -> Handlers:
    """Handlers that reach the engine through `client` only.

    Args:
        chat_template: a file whose template replaces the tokenizer's own.
        tool_call_parser: vLLM's name of a parser, which lets requests choose tools by 'auto'.

    Raises:
        HandlersRefused: vLLM has no such tool parser, or the template does not pass on what a user says.
    """
    parser = _parser(tool_call_parser)
    template = None if chat_template is None else _template(chat_template, client.renderer.tokenizer)
    engine: Any = client
    models = OpenAIServingModels(engine, [BaseModelPath(name, name) for name in model_names])
    shown: dict[str, Any] = {
        "chat_template": template,
        "chat_template_content_format": "auto",
    }

    def conversing(parser: str) -> tuple[OpenAIServingChat, OpenAIServingResponses, OnlineRenderer]:
        tools: dict[str, Any] = {**shown, "enable_auto_tools": True, "tool_parser": parser, "request_logger": None}
        renderer = OffloadedRenderer(offload, engine.model_config, engine.renderer, **tools)
        chat = LaterChat(engine, models, "assistant", online_renderer=renderer, **tools)
        return chat, LaterResponses(engine, models, renderer, tool_server=None, **tools), renderer

    chat, responses, renderer = conversing(parser)
    forced_chat, forced_responses, _ = conversing(CONSTRAINED_PARSER)
    forced_chat.parser_cls = read_cut_lists(forced_chat.parser_cls)
    forced_responses.parser = read_cut_lists(forced_responses.parser)
    plain = OnlineRenderer(engine.model_config, engine.renderer, request_logger=None, **shown)
    return Handlers(
        chat=chat,
        forced_chat=forced_chat,
        completion=LaterCompletion(engine, models, online_renderer=renderer, request_logger=None),
        responses=responses,
        forced_responses=forced_responses,
        tokenization=ServingTokenization(models, plain, request_logger=None, **shown),  # offloaded as a whole
        has_chat_template=template is not None or _has_template(engine.renderer.tokenizer),
    )


def _parser(name: str | None) -> str:
    known = [known for known in ToolParserManager.list_registered() if known != CONSTRAINED_PARSER]
    ToolParserManager.register_module(CONSTRAINED_PARSER, module=ConstrainedToolParser)
    if name is not None and name not in known:
        raise HandlersRefused(f"--tool-call-parser {name} is unknown: use one of {', '.join(known)}")
    return name or CONSTRAINED_PARSER


def _template(file: Path, tokenizer: Any) -> str:
    try:
        template = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise HandlersRefused(f"--chat-template {file}: {error}") from error
    if problem := template_problem(tokenizer, template):
        raise HandlersRefused(f"--chat-template {file}: {problem}")
    return template


def _has_template(tokenizer: Any) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))
