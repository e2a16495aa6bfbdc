"""Whether alternatives exclude one another, so that an answer to any of them is an answer to one of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

TYPES: Final = frozenset(["string", "number", "integer", "array", "object", "boolean", "null"])
_NUMBERS: Final = frozenset(["integer", "number"])


@dataclass(frozen=True, slots=True)
class Claim:
    """What every answer to one alternative is.

    Attributes:
        types: the types that it may have, with one word for every number.
        values: the values that it may have, where they are listed.
        tags: the listed values of each property that it must have, where it is an object.
        open: the schema was given without a type, so that whatever has another one satisfies it too.
    """

    types: frozenset[str]
    values: frozenset[Any] | None
    tags: Mapping[str, frozenset[Any]]
    open: bool


def claim_of(schema: Mapping[str, Any], *, open: bool) -> Claim:
    """The claim of an alternative that is written as it is enforced."""
    if "enum" in schema:
        types = _kinds(name for value in schema["enum"] for name in types_of(value))
        return Claim(types, _canonical_of(schema["enum"]), {}, open)
    named = schema.get("type", TYPES)
    properties = schema.get("properties", {})
    listed = {name: properties[name].get("enum") for name in schema.get("required", ())}
    tags = {name: _canonical_of(values) for name, values in listed.items() if values is not None}
    return Claim(_kinds([named] if isinstance(named, str) else named), None, tags, open)


def exclusive(claims: Sequence[Claim]) -> bool:
    """Whether no answer can satisfy two; looks at each value a fixed number of times."""
    sharing: dict[str, list[Claim]] = defaultdict(list)
    for claim in claims:
        for name in claim.types:
            sharing[name].append(claim)
    opened = [claim for claim in claims if claim.open]
    return all(_apart_as(name, found) and _all_have(name, opened) for name, found in sharing.items())


def _all_have(name: str, claims: Iterable[Claim]) -> bool:
    return all(name in claim.types for claim in claims)


def _apart_as(name: str, found: Sequence[Claim]) -> bool:
    if len(found) == 1 or _apart(claim.values for claim in found):
        return True
    return name == "object" and any(_apart(claim.tags.get(tag) for claim in found) for tag in found[0].tags)


def _apart(listed: Iterable[frozenset[Any] | None]) -> bool:
    seen: set[Any] = set()
    for values in listed:
        if values is None or not seen.isdisjoint(values):
            return False
        seen |= values
    return True


def _kinds(types: Iterable[str]) -> frozenset[str]:
    return frozenset("number" if name == "integer" else name for name in types)


def types_of(value: Any) -> frozenset[str]:
    """The types of a JSON value: an integer is a number too."""
    if isinstance(value, bool):
        return frozenset(["boolean"])
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return _NUMBERS
    names = {str: "string", float: "number", list: "array", dict: "object", type(None): "null"}
    return frozenset([names[type(value)]])


def _canonical_of(values: Iterable[Any]) -> frozenset[Any]:
    return frozenset(map(canonical, values))


def canonical(value: Any) -> Any:
    """A hashable value, the same for JSON values that are equal: 1 and 1.0 are, 1 and true are not."""
    if isinstance(value, bool):
        return "boolean", value
    if isinstance(value, list):
        return "array", tuple(map(canonical, value))
    if isinstance(value, dict):
        return "object", frozenset((name, canonical(item)) for name, item in value.items())
    return value
