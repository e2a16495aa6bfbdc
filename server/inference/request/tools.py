"""Which tool choices this server can keep its word on.

A named tool and `required` are kept by constrained decoding, whatever the model. `auto` leaves the
choice to the model, so that its answer must be read by a parser made for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexgate.server.http.errors import Invalid
from flexgate.server.inference.request.values import invalid


def check_tool_choice(body: dict[str, Any], *, has_parser: bool) -> None:
    """Refuse `auto`, which is also what leaving the choice out means, without a tool parser."""
    choice = body.get("tool_choice")
    if not body.get("tools") or choice == "none":
        return
    if forces_a_call(body):
        _check_forced(body, choice)
    elif choice not in (None, "auto"):
        invalid("'tool_choice' must be 'auto', 'none', 'required' or name a function.", "tool_choice")
    elif not has_parser:
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
            invalid(f"'{name}' cannot be combined with a forced 'tool_choice': leave it out.", name)


def forces_a_call(body: Mapping[str, Any]) -> bool:
    """Whether the answer must call a tool, which constrained decoding ensures."""
    choice = body.get("tool_choice")
    return bool(body.get("tools")) and (choice == "required" or isinstance(choice, dict))
