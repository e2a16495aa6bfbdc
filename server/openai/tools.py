"""Which tool choices this server can keep its word on.

A named tool and `required` are kept by constrained decoding, whatever the model. `auto` leaves the
choice to the model, so that its answer must be read by a parser made for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexgate.server.errors import Invalid
from flexgate.server.openai.values import invalid


def check_tool_choice(body: dict[str, Any], *, has_parser: bool) -> None:
    """Refuse `auto`, which is also what leaving the choice out means, without a tool parser."""
    choice = body.get("tool_choice")
    if not body.get("tools"):
        return
    if forces_a_call(body):
        for name in ("stop", "stop_token_ids"):
            if body.get(name):
                invalid(f"'{name}' could cut off the call that 'tool_choice' asks for.", name)
    if choice == "none" or has_parser:
        return
    if choice is None or choice == "auto":
        raise Invalid(
            "'tool_choice' of 'auto' needs a server started with --tool-call-parser. "
            "Use 'required', 'none' or name a function.",
            param="tool_choice",
            code="unsupported_value",
        )
    if choice != "required" and not isinstance(choice, dict):
        invalid("'tool_choice' must be 'none', 'required' or name a function.", "tool_choice")
    if isinstance(choice, dict) and choice.get("type") != "function":
        invalid("'tool_choice.type' must be 'function'.", "tool_choice.type")


def forces_a_call(body: Mapping[str, Any]) -> bool:
    """Whether the answer must call a tool, which constrained decoding ensures."""
    choice = body.get("tool_choice")
    return bool(body.get("tools")) and (choice == "required" or isinstance(choice, dict))
