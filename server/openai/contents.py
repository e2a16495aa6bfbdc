"""What messages, input items and tools may hold: text and function calls, nothing to fetch.

vLLM's own types accept images, audio, files and embeddings; some of those make the server open a
URL. A text model has no use for them, so that only known parts of known kinds pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NoReturn

from flexgate.server.errors import Invalid, path_of
from flexgate.server.openai.values import invalid

Place = tuple[str | int, ...]

_MESSAGE_KEYS: Final = frozenset(
    ["role", "content", "name", "refusal", "tool_calls", "tool_call_id", "annotations", "audio", "function_call"]
)
_CHAT_ROLES: Final = frozenset(["system", "developer", "user", "assistant", "tool"])
_ITEM_ROLES: Final = frozenset(["system", "developer", "user", "assistant"])
_TEXT_PARTS: Final[Mapping[str, str]] = {"text": "text", "refusal": "refusal"}
_ITEM_PARTS: Final[Mapping[str, str]] = {
    "input_text": "text",
    "output_text": "text",
    "text": "text",
    "refusal": "refusal",
}
_CALL_ITEMS: Final[Mapping[str, frozenset[str]]] = {
    "function_call": frozenset(["type", "id", "call_id", "name", "arguments", "status"]),
    "function_call_output": frozenset(["type", "id", "call_id", "output", "status"]),
}


def check_messages(messages: Any) -> None:
    """Refuse chat messages that hold anything but text and function calls."""
    if not isinstance(messages, list) or not messages:
        invalid("'messages' must be a list with at least one message.", "messages")
    for position, message in enumerate(messages):
        _check_message(message, ("messages", position))


def check_input(items: Any) -> None:
    """Refuse Responses input that holds anything but text and function calls."""
    if isinstance(items, str):
        return
    if not isinstance(items, list) or not items:
        invalid("'input' must be a string or a list of items.", "input")
    for position, item in enumerate(items):
        _check_item(item, ("input", position))


def check_tools(tools: Any, *, flat: bool) -> None:
    """Refuse tools other than functions. `flat` is the Responses form."""
    if not isinstance(tools, list):
        invalid("'tools' must be a list.", "tools")
    for position, tool in enumerate(tools):
        place: Place = ("tools", position)
        if not isinstance(tool, dict) or tool.get("type") != "function":
            _unsupported("only tools of the type 'function' are served", (*place, "type"))
        function, at = (tool, place) if flat else (tool.get("function"), (*place, "function"))
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            _bad("must have a name", at)
        if not isinstance(function.get("parameters", {}), dict | None):
            _bad("must be a JSON schema object", (*at, "parameters"))


def _check_message(message: Any, place: Place) -> None:
    if not isinstance(message, dict):
        _bad("must be an object", place)
    if message.get("role") not in _CHAT_ROLES:
        _bad(f"must be one of {', '.join(sorted(_CHAT_ROLES))}", (*place, "role"))
    _check_keys(message, _MESSAGE_KEYS, place)
    for key in ("audio", "function_call"):
        if message.get(key) is not None:
            _unsupported("only text and 'tool_calls' are served", (*place, key))
    _check_content(message.get("content"), _TEXT_PARTS, (*place, "content"))
    calls = message.get("tool_calls")
    if calls is None:
        return
    if not isinstance(calls, list):
        _bad("must be a list", (*place, "tool_calls"))
    for position, call in enumerate(calls):
        _check_call(call, (*place, "tool_calls", position))


def _check_call(call: Any, place: Place) -> None:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or call.get("type", "function") != "function":
        _bad("must be a function call", place)
    for key in ("name", "arguments"):
        if not isinstance(function.get(key), str):
            _bad("must be a string", (*place, "function", key))


def _check_item(item: Any, place: Place) -> None:
    if not isinstance(item, dict):
        _bad("must be an object", place)
    kind = item.get("type", "message")
    if isinstance(kind, str) and kind in _CALL_ITEMS:
        _check_keys(item, _CALL_ITEMS[kind], place)
        if not isinstance(item.get("output", ""), str):
            _unsupported("only text is served", (*place, "output"))
        return
    if kind != "message":
        _unsupported("only messages and function calls are served", (*place, "type"))
    if item.get("role") not in _ITEM_ROLES:
        _bad(f"must be one of {', '.join(sorted(_ITEM_ROLES))}", (*place, "role"))
    _check_keys(item, frozenset(["type", "role", "content", "id", "status"]), place)
    _check_content(item.get("content"), _ITEM_PARTS, (*place, "content"))


def _check_content(content: Any, parts: Mapping[str, str], place: Place) -> None:
    if content is None or isinstance(content, str):
        return
    if not isinstance(content, list):
        _bad("must be a string or a list of parts", place)
    for position, part in enumerate(content):
        at = (*place, position)
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str) or kind not in parts:
            _unsupported("only text parts are served", (*at, "type"))
        if not isinstance(part.get(parts[kind]), str):
            _bad("must be a string", (*at, parts[kind]))
        _check_keys(part, {"type", parts[kind], "annotations", "logprobs"}, at)


def _check_keys(value: Mapping[str, Any], known: frozenset[str] | set[str], place: Place) -> None:
    for key in value:
        if key not in known:
            _unsupported("it is not a known field", (*place, key[:80]))


def _bad(what: str, place: Sequence[str | int]) -> NoReturn:
    param = path_of(place) or ""
    invalid(f"'{param}' {what}.", param)


def _unsupported(why: str, place: Sequence[str | int]) -> NoReturn:
    param = path_of(place)
    raise Invalid(f"'{param}' is not supported: {why}.", param=param, code="unsupported_parameter")
