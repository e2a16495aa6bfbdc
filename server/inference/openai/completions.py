"""`POST /v1/completions`."""

from __future__ import annotations

from operator import attrgetter
from typing import Final

from flexgate.server.inference.openai.adapted import TextRequest
from flexgate.server.inference.openai.serializers import content, events
from flexgate.server.inference.pipeline import Endpoint
from flexgate.server.inference.request import fields
from flexgate.server.inference.request.prompts import check_completion

_HANDLER: Final = attrgetter("completion.create_completion")
ENDPOINT: Final = Endpoint(
    fields.COMPLETION,
    check_completion,
    needs_chat_template=False,
    model=TextRequest,
    handler=_HANDLER,
    forced=_HANDLER,
    content=content,
    stream=events,
)
