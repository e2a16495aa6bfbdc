"""Calls that `tool_choice` forces: JSON that constrained decoding ensures, whatever format the model was trained on."""

from __future__ import annotations

import json
import re
from typing import Any, Final

from flexgate.server.engine.frontend.constraints.errors import ConstraintError
from flexgate.server.engine.frontend.constraints.schemas import Schema, enforceable
from flexgate.server.engine.seam.handlers import ToolParser
from flexgate.server.engine.seam.openai import StructuredOutputsParams, VLLMValidationError

MAX_CALLS: Final = 8
"""Of one response: a model that does not end the list by itself would call until its length ends."""
_NEXT_CALL: Final = re.compile(r"\s*[\[,]\s*\{")


class ConstrainedToolParser(ToolParser):
    """Reads the calls of `required` and named choices.

    vLLM serves those choices only where some parser is configured; this one has no format of its own, so it fits every
    model. `auto` is refused before a handler could ask it.
    """

    supports_required_and_named = True

    def adjust_request(self, request: Any) -> Any:
        """Constrain the response to the calls that the request forces, instead of a format that it may also have."""
        choice = request.tool_choice
        if not request.tools or choice in (None, "none", "auto"):
            return request
        functions = [getattr(tool, "function", tool) for tool in request.tools]
        parameters = {function.name: function.parameters for function in functions}
        try:
            if choice == "required":
                schema = calls(parameters, parallel=request.parallel_tool_calls is not False)
            else:
                schema = parameters[getattr(choice, "function", choice).name] or _NO_PARAMETERS
        except ConstraintError as error:
            raise VLLMValidationError(f"'tools': {error}.", parameter="tools") from error
        request.structured_outputs = StructuredOutputsParams(json=json.dumps(schema, ensure_ascii=False))
        for name in ("response_format", "text"):  # in chat, in Responses
            if hasattr(request, name):
                setattr(request, name, None)
        return request


def read_cut_lists(parser: Any) -> Any:
    """vLLM's class of parser, which also reads the complete calls of a list that was cut off at its length."""

    class CutListParser(parser):
        def _extract_tool_calls(self, content: str | None, request: Any, *args: Any, **options: Any) -> Any:
            if request.tool_choice == "required":
                content = complete_calls(content or "")
            return super()._extract_tool_calls(content, request, *args, **options)

    return CutListParser


def complete_calls(text: str) -> str:
    """A list of calls, cut after the last complete one."""
    decoder, end = json.JSONDecoder(), 0
    while opened := _NEXT_CALL.match(text, end):
        try:
            _, end = decoder.raw_decode(text, opened.end() - 1)
        except (ValueError, RecursionError):  # not JSON, or nested deeper than Python reads
            break
    return (text[:end] or "[") + "]"


def calls(parameters: dict[str, Schema | None], *, parallel: bool) -> Schema:
    """The schema of a list of calls, in the form that vLLM reads.

    Args:
        parameters: by the tools' names; their references stay within each.
        parallel: whether more than one call may be made.

    Raises:
        Unenforceable: a tool's parameters have a part that is not enforced.
    """
    definitions = {
        str(number): enforceable(schema or _NO_PARAMETERS, place=f"#/$defs/{number}")
        for number, schema in enumerate(parameters.values())
    }
    one = [_call(name, {"$ref": f"#/$defs/{number}"}) for number, name in enumerate(parameters)]
    most = MAX_CALLS if parallel else 1
    return {"type": "array", "minItems": 1, "maxItems": most, "items": {"anyOf": one}, "$defs": definitions}


_NO_PARAMETERS: Final[Schema] = {"type": "object", "properties": {}}


def _call(name: str, parameters: Schema) -> Schema:
    properties = {"name": {"const": name}, "parameters": parameters}
    return {"type": "object", "properties": properties, "required": ["name", "parameters"]}
