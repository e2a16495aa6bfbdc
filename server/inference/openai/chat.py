"""`POST /v1/chat/completions`."""

from __future__ import annotations

from operator import attrgetter
from typing import Final

from flexgate.server.inference.openai.adapted import ChatRequest
from flexgate.server.inference.openai.serializers import content, events
from flexgate.server.inference.pipeline import Endpoint
from flexgate.server.inference.request import fields, limits

ENDPOINT: Final = Endpoint(
    fields.CHAT,
    limits.check_chat,
    needs_chat_template=True,
    model=ChatRequest,
    handler=attrgetter("chat.create_chat_completion"),
    forced=attrgetter("forced_chat.create_chat_completion"),
    content=content,
    stream=events,
)
