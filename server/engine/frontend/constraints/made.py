"""The one constraint that an engine request has, as vLLM's handlers made it of tools, formats and options."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Self

from flexgate.server.engine.frontend.constraints.errors import ConstraintError
from flexgate.server.engine.frontend.constraints.patterns import written_whole
from flexgate.server.engine.frontend.constraints.schemas import enforceable

if TYPE_CHECKING:
    from flexgate.server.engine.seam.engine import StructuredOutputsParams

MAX_MADE_BYTES: Final = 128 * 1024
"""Of a made constraint: 128 tools with long names make less of the schemas that a request may have."""
_ANY_OBJECT: Final = {"type": "object"}


@dataclass(frozen=True, slots=True)
class Constraint:
    """What the compiler is given.

    Attributes:
        kind: ``json``, ``regex``, ``grammar`` (EBNF) or ``structural_tag``.
        text: of that kind; a schema is one that `enforceable` wrote.
    """

    kind: str
    text: str

    def __post_init__(self) -> None:
        if len(self.text.encode()) > MAX_MADE_BYTES:
            raise ConstraintError(f"what its parts make has more than {MAX_MADE_BYTES} bytes")

    @classmethod
    def made(cls, params: StructuredOutputsParams) -> Self:
        """Of vLLM's parameters.

        Raises:
            ConstraintError: it is too large, or has a part that is not enforced.
        """
        if params.json is not None or params.json_object:
            schema = _ANY_OBJECT if params.json is None else params.json
            return cls("json", _dumped(enforceable(_loaded(schema))))
        if params.choice is not None:
            return cls("grammar", _any_of(params.choice))
        if params.structural_tag is not None:
            return cls("structural_tag", _dumped(_with_enforced(_loaded(params.structural_tag))))
        if params.regex is not None:
            return cls("regex", written_whole(params.regex))
        return cls("grammar", params.grammar or "")


def _with_enforced(tag: Any) -> Any:
    """A structural tag with the schemas and patterns in it as the compiler follows them."""
    if isinstance(tag, list):
        return [_with_enforced(item) for item in tag]
    if not isinstance(tag, dict):
        return tag
    if tag.get("type") == "regex" and isinstance(tag.get("pattern"), str):
        return {**tag, "pattern": written_whole(tag["pattern"])}
    return {name: enforceable(item) if name == "json_schema" else _with_enforced(item) for name, item in tag.items()}


def _any_of(choices: list[str]) -> str:
    return "root ::= " + " | ".join(map(_quoted, choices))


def _quoted(text: str) -> str:
    """Text as EBNF has it."""
    return '"' + "".join(f"\\u{ord(c):04x}" if c in '"\\' or c < " " or c == "\x7f" else c for c in text) + '"'


def _loaded(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


def _dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
