"""What messages, input items and tools may hold: text and function calls, nothing to fetch.

vLLM's own types accept images, audio, files and embeddings; some of those make the server open a
URL. A text model has no use for them, so that only known parts of known kinds pass. What passes is
read into one form of each kind: vLLM reads the others in part, or refuses them without saying why.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, NoReturn

from flexgate.server.http.errors import Invalid, path_of
from flexgate.server.inference.request import fields
from flexgate.server.inference.request.values import Table, invalid, keep_honoured, too_much

Place = tuple[str | int, ...]
Object = dict[str, Any]

MAX_TOOLS: Final = 128
MAX_CALLS: Final = 128
"""Of one message, as OpenAI has it."""
MAX_PIECES: Final = 4096
"""Messages or items of a request, with their parts and calls: each is read, checked and rendered by itself."""
_FUNCTION_NAME: Final = re.compile(r"[a-zA-Z0-9_-]{1,64}")

_CHAT_ROLES: Final = frozenset(["system", "developer", "user", "assistant", "tool"])
_ITEM_ROLES: Final = frozenset(["system", "developer", "user", "assistant"])
_PROMPT: Final = "a text, a list of texts, a list of token ids (whole numbers), or a list of such lists"
_STATUSES: Final = frozenset(["in_progress", "completed", "incomplete"])
_PARTS: Final[Mapping[str, tuple[Table, str]]] = {
    **dict.fromkeys(("text", "input_text", "output_text"), (fields.TEXT_PART, "text")),
    "refusal": (fields.REFUSAL_PART, "refusal"),
}


def read_messages(messages: Any) -> list[Object]:
    """Chat messages with their honoured fields; refuses what is neither text nor a function call."""
    if not isinstance(messages, list) or not messages:
        invalid("'messages' must be a list with at least one message.", "messages")
    _require_few(messages, "messages")
    return [_message(message, ("messages", position)) for position, message in enumerate(messages)]


def read_input(items: Any) -> str | list[Object]:
    """Responses input with its honoured fields; refuses what is neither text nor a function call."""
    if isinstance(items, str):
        return items
    if not isinstance(items, list) or not items:
        invalid("'input' must be a string or a list of items.", "input")
    _require_few(items, "input")
    return [_item(item, ("input", position)) for position, item in enumerate(items)]


def read_prompts(prompt: Any) -> list[str | list[int]]:
    """The prompts of a completion, each a text or token ids; a list of ids is one prompt."""
    if prompt is None or prompt in ("", []):
        invalid("'prompt' must not be empty.", "prompt")
    if isinstance(prompt, str) or _are_ids(prompt):
        return [prompt]
    if not isinstance(prompt, list):
        invalid(f"'prompt' must be {_PROMPT}.", "prompt")
    for position, one in enumerate(prompt):
        if not (isinstance(one, str) or _are_ids(one)):
            _bad("must be a text or a list of token ids", ("prompt", position))
    return prompt


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and set(map(type, value)) == {int}


def check_tools(tools: Any, *, flat: bool) -> None:
    """Refuse tools other than functions. `flat` is the Responses form."""
    if not isinstance(tools, list):
        invalid("'tools' must be a list.", "tools")
    if len(tools) > MAX_TOOLS:
        too_much(f"'tools' may have at most {MAX_TOOLS} functions, not {len(tools)}.", "tools")
    for position, tool in enumerate(tools):
        place: Place = ("tools", position)
        if not isinstance(tool, dict) or tool.get("type") != "function":
            _unsupported("only tools of the type 'function' are served", (*place, "type"))
        function, at = (tool, place) if flat else (tool.get("function"), (*place, "function"))
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            _bad("must have a name", at)
        if not _FUNCTION_NAME.fullmatch(function["name"]):
            _bad("must be 1 to 64 of the characters a-z, A-Z, 0-9, '_' and '-'", (*at, "name"))
        if not isinstance(function.get("parameters", {}), dict | None):
            _bad("must be a JSON schema object", (*at, "parameters"))


def check_tool_choice(body: Mapping[str, Any], *, has_parser: bool) -> bool:
    """Whether the response must call a tool; refuses `auto`, which is also the default, without a tool parser.

    A named tool and `required` are kept by constrained decoding, whatever the model. `auto` leaves the choice to the
    model, so that its answer must be read by a parser made for it.
    """
    choice = body.get("tool_choice")
    if not body.get("tools") or choice == "none":
        return False
    if forces_a_call(body):
        _check_forced(body, choice)
        return True
    if choice not in (None, "auto"):
        invalid("'tool_choice' must be 'auto', 'none', 'required' or name a function.", "tool_choice")
    if not has_parser:
        raise Invalid(
            "'tool_choice' of 'auto', the default with tools, needs a server started with --tool-call-parser. "
            "Use 'required', 'none' or name a function.",
            param="tool_choice",
            code="unsupported_value",
        )
    return False


def _check_forced(body: Mapping[str, Any], choice: Any) -> None:
    if isinstance(choice, dict) and choice.get("type") != "function":
        invalid("'tool_choice.type' must be 'function'.", "tool_choice.type")
    for name in ("stop", "stop_token_ids"):
        if body.get(name):
            invalid(f"'{name}' cannot be combined with a forced 'tool_choice': leave it out.", name)


def forces_a_call(body: Mapping[str, Any]) -> bool:
    """Whether the answer must call a tool, which constrained decoding ensures."""
    choice = body.get("tool_choice")
    return bool(body.get("tools")) and (choice == "required" or isinstance(choice, dict))


def _require_few(items: list[Any], param: str) -> None:
    pieces = len(items) if len(items) > MAX_PIECES else sum(map(_pieces, items))
    if pieces > MAX_PIECES:
        too_much(f"'{param}' may have at most {MAX_PIECES} entries, parts and calls together, not {pieces}.", param)


def _pieces(item: Any) -> int:
    inside = [item.get(name) for name in ("content", "output", "tool_calls")] if isinstance(item, dict) else []
    return 1 + sum(len(value) for value in inside if isinstance(value, list))


def _message(message: Any, place: Place) -> Object:
    kept = _object(message, fields.MESSAGE, place)
    _one_of(kept, "role", _CHAT_ROLES, place)
    if "content" in kept:
        kept["content"] = _content(kept["content"], (*place, "content"), text_type="text")
    calls = kept.get("tool_calls")
    if calls is not None:
        if not isinstance(calls, list):
            _bad("must be a list", (*place, "tool_calls"))
        if len(calls) > MAX_CALLS:
            param = path_of((*place, "tool_calls")) or ""
            too_much(f"'{param}' may have at most {MAX_CALLS} calls, not {len(calls)}.", param)
        kept["tool_calls"] = [_call(call, (*place, "tool_calls", n)) for n, call in enumerate(calls)]
    return kept


def _call(call: Any, place: Place) -> Object:
    kept = _object(call, fields.TOOL_CALL, place)
    if kept.setdefault("type", "function") != "function":
        _bad("must be a function call", place)
    function = _object(kept.get("function"), fields.CALLED_FUNCTION, (*place, "function"))
    _texts(function, ("name", "arguments"), (*place, "function"))
    return kept | {"function": function}


def _item(item: Any, place: Place) -> Object:
    if not isinstance(item, dict):
        _bad("must be an object", place)
    kind = item.get("type") or "message"
    if kind == "message":
        return _item_message(_object(item, fields.ITEM_MESSAGE, place), place)
    if kind == "function_call":
        call = _object(item, fields.ITEM_CALL, place)
        _texts(call, ("call_id", "name", "arguments"), place)
        return call
    if kind != "function_call_output":
        _unsupported("only messages and function calls are served", (*place, "type"))
    output = _object(item, fields.ITEM_OUTPUT, place)
    _texts(output, ("call_id",), place)
    return output | {"output": _text(output.get("output"), (*place, "output"))}


def _item_message(item: Object, place: Place) -> Object:
    """A message in the form that vLLM reads whole: of an assistant's it takes the first part alone."""
    role = _one_of(item, "role", _ITEM_ROLES, place)
    at = (*place, "content")
    if role != "assistant":
        return {"role": role, "content": _content(item.get("content"), at, text_type="input_text")}
    part = {"type": "output_text", "text": _text(item.get("content"), at), "annotations": []}
    status = _one_of({"status": "completed"} | item, "status", _STATUSES, place)
    return {"type": "message", "id": "msg", "role": role, "status": status, "content": [part]}


def _text(content: Any, place: Place) -> str:
    """Content as one text, its parts joined as vLLM joins them for chat templates."""
    parts = _content(content, place, text_type="text")
    return parts if isinstance(parts, str) else "\n".join(part["text"] for part in parts)


def _content(content: Any, place: Place, *, text_type: str) -> str | list[Object]:
    """A text, or parts of the type `text_type`; to a text model a refusal is text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        _bad("must be a string or a list of parts", place)
    return [_part(part, (*place, n), text_type) for n, part in enumerate(content)]


def _part(part: Any, place: Place, text_type: str) -> Object:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str) or kind not in _PARTS:
        _unsupported("only text parts are served", (*place, "type"))
    table, name = _PARTS[kind]
    kept = _object(part, table, place)
    _texts(kept, (name,), place)
    return {"type": text_type, "text": kept[name]}


def _object(value: Any, table: Table, place: Place) -> Object:
    if not isinstance(value, dict):
        _bad("must be an object", place)
    return keep_honoured(value, table, under=place)


def _one_of(value: Mapping[str, Any], name: str, known: frozenset[str], place: Place) -> str:
    word = value.get(name)
    if not isinstance(word, str) or word not in known:
        _bad(f"must be one of {', '.join(sorted(known))}", (*place, name))
    return word


def _texts(value: Mapping[str, Any], names: Sequence[str], place: Place) -> None:
    for name in names:
        if not isinstance(value.get(name), str):
            _bad("must be a string", (*place, name))


def _bad(what: str, place: Sequence[str | int]) -> NoReturn:
    param = path_of(place) or ""
    invalid(f"'{param}' {what}.", param)


def _unsupported(why: str, place: Sequence[str | int]) -> NoReturn:
    param = path_of(place)
    raise Invalid(f"'{param}' is not supported: {why}.", param=param, code="unsupported_parameter")
