"""What a Responses request may ask for: messages, function calls and their outputs, within limits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from flexgate.server.inference.request import fields
from flexgate.server.inference.request.grammars import check_format
from flexgate.server.inference.request.limits import Body, Limits, check_sampling
from flexgate.server.inference.request.messages import (
    Object,
    Place,
    bad,
    check_length,
    check_tool_choice,
    check_tools,
    cuts,
    object_of,
    one_of,
    read_content,
    require_few,
    texts,
    unsupported,
)
from flexgate.server.inference.request.values import integer, invalid

_ROLES: Final = frozenset(["system", "developer", "user", "assistant"])
_STATUSES: Final = frozenset(["in_progress", "completed", "incomplete"])


def check_responses(body: Body, limits: Limits) -> None:
    """Refuse a Responses request over its limits, or with something to fetch."""
    check_sampling(body, limits)
    integer(body, "max_output_tokens", 1)
    integer(body, "top_logprobs", 0, limits.logprobs)
    body["input"] = read_input(body.get("input"))
    check_tools(body, limits, flat=True)
    check_tool_choice(body, has_parser=limits.has_tool_parser)
    if cuts(body):
        check_length("input", limits, body["input"], body.get("instructions"), body.get("tools"))
    form = body.get("text")
    if isinstance(form, Mapping) and isinstance(form.get("format"), Mapping):
        check_format(form["format"], form["format"], "text.format", longest=limits.grammar_bytes)


def read_input(items: Any) -> str | list[Object]:
    """Responses input with its honoured fields; refuses what is neither text nor a function call."""
    if isinstance(items, str):
        return items
    if not isinstance(items, list) or not items:
        invalid("'input' must be a string or a list of items.", "input")
    require_few(items, "input")
    return [_item(item, ("input", position)) for position, item in enumerate(items)]


def _item(item: Any, place: Place) -> Object:
    if not isinstance(item, dict):
        bad("must be an object", place)
    kind = item.get("type") or "message"
    if kind == "message":
        return _item_message(object_of(item, fields.ITEM_MESSAGE, place), place)
    if kind == "function_call":
        call = object_of(item, fields.ITEM_CALL, place)
        texts(call, ("call_id", "name", "arguments"), place)
        return call
    if kind != "function_call_output":
        unsupported("must be one of function_call, function_call_output, message", (*place, "type"))
    output = object_of(item, fields.ITEM_OUTPUT, place)
    texts(output, ("call_id",), place)
    return output | {"output": _text(output.get("output"), (*place, "output"))}


def _item_message(item: Object, place: Place) -> Object:
    """A message in the form that vLLM reads whole: of an assistant's it takes the first part alone."""
    role = one_of(item, "role", _ROLES, place)
    at = (*place, "content")
    if role != "assistant":
        return {"role": role, "content": read_content(item.get("content"), at, text_type="input_text")}
    part = {"type": "output_text", "text": _text(item.get("content"), at), "annotations": []}
    status = one_of({"status": "completed"} | item, "status", _STATUSES, place)
    return {"type": "message", "id": "msg", "role": role, "status": status, "content": [part]}


def _text(content: Any, place: Place) -> str:
    """Content as one text, its parts joined as vLLM joins them for chat templates."""
    parts = read_content(content, place, text_type="text")
    return parts if isinstance(parts, str) else "\n".join(part["text"] for part in parts)
