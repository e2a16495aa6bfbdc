"""Fields of vLLM's responses that OpenAI's do not have: sent where they say something, left out where they are null.

Clients put a response into their next request as it came, and some stop at a field that they do not know.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Final, get_args

from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response as OpenAiResponse
from pydantic import BaseModel
from starlette.responses import JSONResponse

from flexgate.server.engine.seam.openai import (
    ChatCompletionResponse,
    ChatCompletionStreamResponse,
    CompletionResponse,
    CompletionStreamResponse,
    ResponsesResponse,
)

_SENT: Final = (ChatCompletionResponse, ChatCompletionStreamResponse, CompletionResponse, CompletionStreamResponse)
_KNOWN: Final = (ChatCompletion, ChatCompletionChunk, Completion)


def names_of(types: Iterable[Any]) -> frozenset[str]:
    """Names of the fields that pydantic models have at any depth."""
    names: set[str] = set()
    left, seen = list(types), set()
    while left:
        kind = left.pop()
        if kind in seen:
            continue
        seen.add(kind)
        left += get_args(kind)
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            names |= {field.alias or name for name, field in kind.model_fields.items()}
            left += [field.annotation for field in kind.model_fields.values()]
    return frozenset(names)


FOREIGN: Final = names_of(_SENT) - names_of(_KNOWN)
FOREIGN_IN_RESPONSES: Final = frozenset(ResponsesResponse.model_fields) - frozenset(OpenAiResponse.model_fields)
# No text matches: inside of a JSON string every quote is escaped. The names stand in the pattern only where a comma
# has to go with the field behind it: trying all of them at every field takes twice as long.
_FIRST: Final = rf'(?<=\{{)(?:"(?:{"|".join(sorted(FOREIGN))})":null,?)+'
_NULLS: Final = re.compile(rf',"(\w+)":null|{_FIRST}')


def without_nulls(text: str) -> str:
    """Compact JSON of a chat or completion response, or of a part of its stream, without null foreign fields."""
    return _NULLS.sub(_kept, text)


def _kept(found: re.Match[str]) -> str:
    return found[0] if found[1] and found[1] not in FOREIGN else ""


class LeanResponse(JSONResponse):
    """A response as JSON, without null foreign fields."""

    def render(self, content: Any) -> bytes:
        """The body."""
        return without_nulls(super().render(content).decode()).encode()
