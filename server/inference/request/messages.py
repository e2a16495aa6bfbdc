"""What messages and tools may hold: text and function calls, nothing to fetch.

vLLM's own types accept images, audio, files and embeddings; some of those make the server open a
URL. A text model has no use for them, so that only known parts of known kinds pass. What passes is
read into one form of each kind: vLLM reads the others in part, or refuses them without saying why.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NoReturn

from flexgate.policies.field_errors import path_of
from flexgate.server.http.errors import CONTEXT_LENGTH_EXCEEDED, PROMPT_TOO_LONG, Invalid
from flexgate.server.inference.request import fields
from flexgate.server.inference.request.grammars import as_text, check_enforced, check_schema
from flexgate.server.inference.request.values import Table, characters, invalid, keep_honoured, too_much

if TYPE_CHECKING:
    from flexgate.server.inference.request.limits import Limits

Place = tuple[str | int, ...]
Object = dict[str, Any]

MAX_TOOLS: Final = 128
MAX_CALLS: Final = 128
"""Of one message, as OpenAI has it."""
MAX_PIECES: Final = 4096
"""Messages or items of a request, with their parts and calls: each is read, checked and rendered by itself."""
_FUNCTION_NAME: Final = re.compile(r"[a-zA-Z0-9_-]{1,64}")

_CHAT_ROLES: Final = frozenset(["system", "developer", "user", "assistant", "tool"])
_PARTS: Final[Mapping[str, tuple[Table, str]]] = {
    **dict.fromkeys(("text", "input_text", "output_text"), (fields.TEXT_PART, "text")),
    "refusal": (fields.REFUSAL_PART, "refusal"),
}


def read_messages(messages: Any) -> list[Object]:
    """Chat messages with their honoured fields; refuses what is neither text nor a function call."""
    if not isinstance(messages, list) or not messages:
        invalid("'messages' must be a list with at least one message.", "messages")
    require_few(messages, "messages")
    return [_message(message, ("messages", position)) for position, message in enumerate(messages)]


def _check_functions(tools: Any, *, flat: bool) -> None:
    """Refuse tools other than functions. `flat` is the Responses form."""
    if not isinstance(tools, list):
        invalid("'tools' must be a list.", "tools")
    if len(tools) > MAX_TOOLS:
        too_much(f"'tools' may have at most {MAX_TOOLS} functions, not {len(tools)}.", "tools")
    for position, tool in enumerate(tools):
        place: Place = ("tools", position)
        if not isinstance(tool, dict) or tool.get("type") != "function":
            unsupported("must be 'function': no other tools are served", (*place, "type"))
        function, at = (tool, place) if flat else (tool.get("function"), (*place, "function"))
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            bad("must have a name", at)
        if not _FUNCTION_NAME.fullmatch(function["name"]):
            bad("must be 1 to 64 characters from a-z, A-Z, 0-9, '_' and '-'", (*at, "name"))
        if not isinstance(function.get("parameters", {}), dict | None):
            bad("must be a JSON schema object", (*at, "parameters"))


def check_conversation(body: Object, limits: Limits, *, measure: bool) -> None:
    """Read chat's messages and tools into one form; refuses what is neither text nor a function call."""
    body["messages"] = read_messages(body.get("messages"))
    check_tools(body, limits, flat=False)
    if measure:
        check_length("messages", limits, body["messages"], body.get("tools"))


def cuts(body: Object) -> bool:
    """Whether a prompt may be longer than the model: vLLM makes tokens of all of it then, and refuses it else."""
    return body.get("truncate_prompt_tokens") is not None or body.get("truncation") not in (None, "disabled")


def check_length(name: str, limits: Limits, *texts: Any) -> None:
    """Refuse text that cannot fit the model, before it takes the time of the one tokenizer thread."""
    count = characters(texts)
    if count > limits.prompt_chars:
        raise Invalid(
            f"{PROMPT_TOO_LONG}: '{name}' may have at most {limits.prompt_chars} characters, not {count}: "
            f"the {limits.prompt_tokens} tokens of this model cannot hold more.",
            param=name,
            code=CONTEXT_LENGTH_EXCEEDED,
        )


def check_tools(body: Object, limits: Limits, *, flat: bool) -> None:
    """Refuse tools other than functions, and schemas that are too large or not enforced. `flat` is Responses' form."""
    tools = body.get("tools")
    if tools is None:
        return
    _check_functions(tools, flat=flat)
    functions = [tool if flat else tool["function"] for tool in tools]
    places = [f"tools[{position}].{'parameters' if flat else 'function.parameters'}" for position in range(len(tools))]
    schemas = [function.get("parameters") or {} for function in functions]
    total = 0
    for schema, param in zip(schemas, places, strict=True):
        total += len(as_text(check_schema(schema, param, longest=limits.grammar_bytes), param).encode())
        if total > limits.grammar_bytes:
            too_much(f"'tools' may have at most {limits.grammar_bytes} bytes of schemas.", "tools")
    for schema, param, function in zip(schemas, places, functions, strict=True):
        if schema and (forces_a_call(body) or function.get("strict")):
            written = check_enforced(schema, param, longest=limits.grammar_bytes)
            if written.get("type") != "object":
                invalid(f"'{param}' must have the type 'object'.", param)


def check_tool_choice(body: Mapping[str, Any], *, has_parser: bool) -> None:
    """Refuse `auto`, also the default, without a tool parser, and fields that a forced call excludes.

    A named tool and `required` are kept by constrained decoding, whatever the model. `auto` leaves the choice to the
    model, so that its response must be read by a parser made for it.
    """
    choice = body.get("tool_choice")
    if forces_a_call(body):
        _check_forced(body, choice)
        return
    if not body.get("tools") or choice == "none":
        return
    if choice not in (None, "auto"):
        invalid("'tool_choice' must be 'auto', 'none', 'required' or name a function.", "tool_choice")
    if not has_parser:
        raise Invalid(
            "'tool_choice' of 'auto', the default with tools, needs a server started with --tool-call-parser. "
            "Use 'required', 'none' or name a function.",
            param="tool_choice",
            code="unsupported_value",
        )


def _check_forced(body: Mapping[str, Any], choice: Any) -> None:
    if isinstance(choice, dict) and choice.get("type") != "function":
        invalid("'tool_choice.type' must be 'function'.", "tool_choice.type")
    for name in ("stop", "stop_token_ids"):
        if body.get(name):
            invalid(f"'{name}' cannot be combined with a forced 'tool_choice': leave '{name}' out.", name)


def forces_a_call(body: Mapping[str, Any]) -> bool:
    """Whether the response must call a tool, which constrained decoding ensures."""
    choice = body.get("tool_choice")
    return bool(body.get("tools")) and (choice == "required" or isinstance(choice, dict))


def require_few(items: list[Any], param: str) -> None:
    """Refuse more than `MAX_PIECES` messages or items, their parts and calls included."""
    pieces = len(items) if len(items) > MAX_PIECES else sum(map(_pieces, items))
    if pieces > MAX_PIECES:
        what = f"{'items' if param == 'input' else param}, content parts and tool calls"
        too_much(f"A request may have at most {MAX_PIECES} {what} in total, not {pieces}.", param)


def _pieces(item: Any) -> int:
    inside = [item.get(name) for name in ("content", "output", "tool_calls")] if isinstance(item, dict) else []
    return 1 + sum(len(value) for value in inside if isinstance(value, list))


def _message(message: Any, place: Place) -> Object:
    kept = object_of(message, fields.MESSAGE, place)
    one_of(kept, "role", _CHAT_ROLES, place)
    if "content" in kept:
        kept["content"] = read_content(kept["content"], (*place, "content"), text_type="text")
    calls = kept.get("tool_calls")
    if calls is not None:
        if not isinstance(calls, list):
            bad("must be a list", (*place, "tool_calls"))
        if len(calls) > MAX_CALLS:
            param = path_of((*place, "tool_calls")) or ""
            too_much(f"'{param}' may have at most {MAX_CALLS} calls, not {len(calls)}.", param)
        kept["tool_calls"] = [_call(call, (*place, "tool_calls", n)) for n, call in enumerate(calls)]
    return kept


def _call(call: Any, place: Place) -> Object:
    kept = object_of(call, fields.TOOL_CALL, place)
    if kept.setdefault("type", "function") != "function":
        bad("must be a function call", place)
    function = object_of(kept.get("function"), fields.CALLED_FUNCTION, (*place, "function"))
    texts(function, ("name", "arguments"), (*place, "function"))
    return kept | {"function": function}


def read_content(value: Any, place: Place, *, text_type: str) -> str | list[Object]:
    """A text, or parts of the type `text_type`; to a text model a refusal is text."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        bad("must be a string or a list of parts", place)
    return [_part(part, (*place, n), text_type) for n, part in enumerate(value)]


def _part(part: Any, place: Place, text_type: str) -> Object:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str) or kind not in _PARTS:
        unsupported(f"must be one of {', '.join(sorted(_PARTS))}: only text is served", (*place, "type"))
    table, name = _PARTS[kind]
    kept = object_of(part, table, place)
    texts(kept, (name,), place)
    return {"type": text_type, "text": kept[name]}


def object_of(value: Any, table: Table, place: Place) -> Object:
    """The honoured fields of an object."""
    if not isinstance(value, dict):
        bad("must be an object", place)
    return keep_honoured(value, table, under=place)


def one_of(value: Mapping[str, Any], name: str, known: frozenset[str], place: Place) -> str:
    """The field `name`, which must be one of the known words."""
    word = value.get(name)
    if not isinstance(word, str) or word not in known:
        bad(f"must be one of {', '.join(sorted(known))}", (*place, name))
    return word


def texts(value: Mapping[str, Any], names: Sequence[str], place: Place) -> None:
    """Refuse an object in which one of the fields is no string."""
    for name in names:
        if not isinstance(value.get(name), str):
            bad("must be a string", (*place, name))


def bad(what: str, place: Sequence[str | int]) -> NoReturn:
    """Refuse the value at a place; `what` ends the sentence."""
    param = path_of(place) or ""
    invalid(f"'{param}' {what}.", param)


def unsupported(what: str, place: Sequence[str | int]) -> NoReturn:
    """Refuse the value at a place, which is not served; `what` ends the sentence."""
    param = path_of(place)
    raise Invalid(f"'{param}' {what}.", param=param, code="unsupported_value")
