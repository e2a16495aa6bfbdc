"""Which JSON schemas xgrammar enforces, keyword by keyword, and how to write the rest so that it does.

Everything that is generated under the schema that `enforceable` returns satisfies the one it was given. What it returns
may allow less: xgrammar, for one, adds no property that is not named. The table is committed here and tried with an
independent validator on sampled answers in `tests/server/engine/frontend/constraints/test_schemas.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import ceil, floor, inf
from typing import Any, Final, cast

from flexgate.server.engine.frontend.constraints.alternatives import TYPES, Claim, claim_of, exclusive, types_of
from flexgate.server.engine.frontend.constraints.errors import Unenforceable
from flexgate.server.engine.frontend.constraints.patterns import written_in_json

Schema = dict[str, Any]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_PLAIN_CHARACTER: Final = r'[^"\\\x00-\x1f]'
_TIME: Final = r"([01]\d|2[0-3]):[0-5]\d:[0-5]\d(\.\d{1,9})?(Z|[+\-]([01]\d|2[0-3]):[0-5]\d)"
_DAY: Final = r"((0[13578]|1[02])\-(0[1-9]|[12]\d|3[01])|(0[469]|11)\-(0[1-9]|[12]\d|30)|02\-(0[1-9]|1\d|2[0-8]))"
_YEAR: Final = r"(000[1-9]|00[1-9]\d|0[1-9]\d\d|[1-9]\d\d\d)"
_LEAP_YEAR: Final = r"(\d\d(0[48]|[2468][048]|[13579][26])|(0[48]|[2468][048]|[13579][26])00)"
_DATE: Final = f"({_YEAR}\\-{_DAY}|{_LEAP_YEAR}\\-02\\-29)"
_BYTE: Final = r"(25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
_LABEL: Final = r"[A-Za-z0-9]([A-Za-z0-9\-]{0,29}[A-Za-z0-9])?"
_HOST: Final = f"{_LABEL}(\\.{_LABEL}){{0,6}}"
"""At most 223 of the 253 characters that a name may have, in labels of at most 31 of 63."""
_ATOM: Final = r"[A-Za-z0-9_!#$%&'*+/=?^`{|}~\-]{1,20}"
_WRITTEN_FORMATS: Final = {
    name: written_in_json(pattern)
    for name, pattern in {
        "date": f"^{_DATE}$",
        "time": f"^{_TIME}$",
        "date-time": f"^{_DATE}T{_TIME}$",
        "email": f"^{_ATOM}(\\.{_ATOM}){{0,2}}@{_HOST}$",
        "hostname": f"^{_HOST}$",
        "ipv4": f"^{_BYTE}\\.{_BYTE}\\.{_BYTE}\\.{_BYTE}$",
    }.items()
}
"""Formats that xgrammar reads too widely: 31 November, a leap second at noon, 093.1.1.1, a quoted name before an '@'
with escapes that JSON has not, labels of any length."""
FORMATS: Final = frozenset(["duration", "ipv6", "uuid", "uri", "uri-reference", "uri-template", *_WRITTEN_FORMATS])

_OF_TYPE: Final[Mapping[str, frozenset[str]]] = {
    "string": frozenset(["minLength", "maxLength", "pattern", "format"]),
    "number": frozenset(["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"]),
    "array": frozenset(["items", "prefixItems", "minItems", "maxItems"]),
    "object": frozenset(
        [
            "properties",
            "required",
            "additionalProperties",
            "patternProperties",
            "propertyNames",
            "minProperties",
            "maxProperties",
        ]
    ),
}
ANNOTATIONS: Final = _words(
    "title description default examples example deprecated readOnly writeOnly discriminator $schema $comment "
    "$defs definitions contentEncoding contentMediaType strict"
)
UNENFORCED: Final = _words(
    "not if then else dependentRequired dependentSchemas dependencies contains minContains maxContains "
    "uniqueItems multipleOf unevaluatedItems unevaluatedProperties additionalItems $dynamicRef $dynamicAnchor "
    "$recursiveRef $recursiveAnchor $anchor $id id contentSchema divisibleBy disallow extends $vocabulary"
)
_HEADS: Final = ("$ref", "const", "enum", "anyOf", "oneOf", "allOf")
_ASSERTIONS: Final = frozenset().union(*_OF_TYPE.values(), _HEADS, ["type"], UNENFORCED)


def enforceable(schema: Any, *, place: str = "#") -> Any:
    """A schema that xgrammar enforces, whose every answer satisfies `schema`; raises `Unenforceable`.

    Args:
        place: where the result will stand in a larger schema, as a reference to it is written.
    """
    return _Rewrite(place).whole(schema)


class _Rewrite:
    """One walk over a schema."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._places: dict[str, Schema] = {}
        self._references: dict[str, str] = {}
        self._inferred: set[str] = set()
        self._alternatives: list[list[str]] = []
        self._claims: dict[str, Claim] = {}

    def whole(self, schema: Any) -> Any:
        written = self._schema(schema, "#")
        for target in set(self._references.values()) - self._places.keys():
            raise Unenforceable(f"'$ref' to '{_shown(target)}' leads to no supported schema of this document")
        if not all(exclusive([self._claim(branch) for branch in branches]) for branches in self._alternatives):
            raise Unenforceable(
                "'oneOf' is supported only where its schemas differ in 'type', in 'const' or in the 'const' of a "
                "property that all require"
            )
        return written

    def _claim(self, place: str) -> Claim:
        place = self._references.get(place, place)
        if place not in self._claims:
            self._claims[place] = claim_of(self._places[place], open=place in self._inferred)
        return self._claims[place]

    def _schema(self, schema: Any, place: str) -> Any:
        self._places[place] = written = self._written(schema, place)
        return written

    def _written(self, schema: Any, place: str) -> Schema:
        if schema is True or schema == {}:
            return {}
        if not isinstance(schema, dict):
            why = "'false' allows nothing" if schema is False else "a schema must be an object or true"
            raise Unenforceable(why)
        self._refuse_unenforced(schema)
        written = self._definitions(schema, place)
        heads = [name for name in _HEADS if name in schema]
        if heads:
            return written | self._head(schema, heads[0], place)
        return written | self._typed(schema, place)

    def _refuse_unenforced(self, schema: Schema) -> None:
        for name in sorted(schema.keys() & UNENFORCED):
            if not (name == "uniqueItems" and schema[name] is False):
                raise Unenforceable(f"the keyword '{name}' is not supported")

    def _definitions(self, schema: Schema, place: str) -> Schema:
        names = [name for name in ("$defs", "definitions") if name in schema]
        return {name: self._named(schema[name], f"{place}/{name}", name) for name in names}

    def _named(self, schemas: Any, place: str, keyword: str) -> Schema:
        if not isinstance(schemas, dict):
            raise Unenforceable(f"'{keyword}' must be an object")
        return {name: self._schema(schema, f"{place}/{_escaped(name)}") for name, schema in schemas.items()}

    def _listed(self, schemas: Any, place: str, keyword: str) -> list[Any]:
        if not isinstance(schemas, list) or not schemas:
            raise Unenforceable(f"'{keyword}' must be a list with at least one schema")
        return [self._schema(schema, f"{place}/{keyword}/{position}") for position, schema in enumerate(schemas)]

    def _head(self, schema: Schema, head: str, place: str) -> Schema:
        """A keyword that xgrammar looks at alone."""
        beside = (schema.keys() & _ASSERTIONS) - {head} - UNENFORCED
        may_have_type = head not in ("$ref", "allOf")
        for name in sorted(beside - ({"type"} if may_have_type else set())):
            raise Unenforceable(f"'{name}' beside '{head}' is not supported")
        types = _types(schema) if beside else TYPES
        if head == "$ref":
            return {"$ref": self._reference(schema["$ref"], place)}
        if head in ("const", "enum"):
            return {"enum": _values(schema, head, types)}
        branches = self._listed(schema[head], place, head)
        if head == "allOf" and len(branches) != 1:
            raise Unenforceable("'allOf' of several schemas is not supported")
        if beside and not all(_types_within(branch, types) for branch in branches):
            raise Unenforceable(f"'type' beside '{head}' is supported only where each of its schemas has that type")
        if head == "oneOf":
            self._alternatives.append([f"{place}/{head}/{position}" for position in range(len(branches))])
        return {"anyOf": branches} if head == "oneOf" else {head: branches}

    def _reference(self, target: Any, place: str) -> str:
        if not isinstance(target, str) or not (target == "#" or target.startswith("#/")):
            raise Unenforceable("'$ref' is supported within the schema only: '#/$defs/…'")
        if "~" in target or "%" in target:
            raise Unenforceable("'$ref' with '~' or '%' is not supported")
        self._references[place] = target
        return self._root + target[1:]

    def _typed(self, schema: Schema, place: str) -> Schema:
        present = schema.keys() & _ASSERTIONS - {"type"} - UNENFORCED
        if "type" not in schema:
            self._inferred.add(place)
        types = _types(schema) if "type" in schema else _inferred(present)
        if types is TYPES:
            return {}
        types -= {"integer"} if "number" in types else frozenset()
        written: Schema = {"type": sorted(types) if len(types) > 1 else next(iter(types))}
        for kind, write in self._writers().items():
            names = present & _OF_TYPE["number" if kind == "integer" else kind]
            if kind in types:
                written |= write({name: schema[name] for name in sorted(names)}, place)
        return written

    def _writers(self) -> dict[str, Callable[[Schema, str], Schema]]:
        numbers = {"number": _number, "integer": _integer}
        return {"string": _string, **numbers, "array": self._array, "object": self._object}

    def _array(self, schema: Schema, place: str) -> Schema:
        written: Schema = {name: _count(schema, name) for name in ("minItems", "maxItems") if name in schema}
        if "prefixItems" in schema:
            written["prefixItems"] = self._listed(schema["prefixItems"], place, "prefixItems")
        items = schema.get("items", "prefixItems" not in schema)
        written["items"] = False if items is False else self._schema(items, f"{place}/items")
        listed, most = len(written.get("prefixItems", ())), written.get("maxItems", inf)
        _require_room("prefixItems", listed, most)
        _require_room("minItems", written.get("minItems", 0), listed if items is False else most)
        return written

    def _object(self, schema: Schema, place: str) -> Schema:
        written: Schema = {name: _count(schema, name) for name in ("minProperties", "maxProperties") if name in schema}
        named = schema.get("properties", {})
        listed = "properties" in schema and (named != {} or "additionalProperties" not in schema)
        if not isinstance(named, dict):
            raise Unenforceable("'properties' must be an object")
        required = schema.get("required") or []
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            raise Unenforceable("'required' must be a list of names")
        for name in required:
            if name not in named:
                raise Unenforceable(f"'required' names '{_shown(name)}', which is not in 'properties'")
        required = list(dict.fromkeys(required))
        closed = listed or (schema.get("additionalProperties") is False and "patternProperties" not in schema)
        most = min(len(named) if closed else inf, written.get("maxProperties", inf))
        _require_room("required", len(required), most)
        _require_room("minProperties", written.get("minProperties", 0), most)
        if listed:
            for name in schema.keys() & {"patternProperties", "propertyNames"}:
                raise Unenforceable(f"'{name}' beside 'properties' is not supported")
            if not named:
                return written | {"additionalProperties": False}
            properties = self._named(named, f"{place}/properties", "properties")
            return written | {"properties": properties, "required": required, "additionalProperties": False}
        if written.get("minProperties", 0) > 1:
            raise Unenforceable("'minProperties' of more than 1 is supported for 'properties' only")
        return written | self._open_object(schema, place)

    def _open_object(self, schema: Schema, place: str) -> Schema:
        """An object whose names are not listed."""
        patterns = schema.get("patternProperties")
        others = schema.get("additionalProperties", True)
        if patterns is not None:
            if not isinstance(patterns, dict) or len(patterns) != 1 or "propertyNames" in schema:
                raise Unenforceable("'patternProperties' is supported with one pattern, and without 'propertyNames'")
            values = self._named(patterns, f"{place}/patternProperties", "patternProperties")
            return {"patternProperties": {written_in_json(name): value for name, value in values.items()}}
        written: Schema = {}
        if "propertyNames" in schema:
            names = self._schema(schema["propertyNames"], f"{place}/propertyNames")
            if names and not (_types(names) == {"string"} and "enum" not in names):
                names = self._names(schema["propertyNames"], f"{place}/propertyNames")
            written |= {"propertyNames": names} if names else {}
        others = others if others is False else self._schema(others, f"{place}/additionalProperties")
        return written | {"additionalProperties": True if others == {} else others}

    def _names(self, schema: Schema, place: str) -> Schema:
        """What of a schema for names can be one: they are strings, whatever else it allows."""
        if "string" not in _types(schema):
            raise Unenforceable("'propertyNames' of another type than 'string' allows nothing")
        return cast(Schema, self._schema(schema | {"type": "string"}, place))


def _types(schema: Schema) -> frozenset[str]:
    named = schema.get("type", sorted(TYPES))
    types = [named] if isinstance(named, str) else named
    if not isinstance(types, list) or not types or not all(isinstance(item, str) for item in types):
        raise Unenforceable("'type' must be a type or a list of types")
    for item in types:
        if item not in TYPES:
            raise Unenforceable(f"there is no type '{_shown(item)}'")
    return frozenset(types)


def _inferred(present: frozenset[str] | set[str]) -> frozenset[str]:
    """The one type that keywords without a type are for; xgrammar ignores most of them otherwise."""
    kinds = [kind for kind, names in _OF_TYPE.items() if present & names]
    if len(kinds) > 1:
        raise Unenforceable(f"'{min(present)}' needs a 'type' beside it")
    return frozenset(kinds) if kinds else TYPES


def _values(schema: Schema, head: str, types: frozenset[str]) -> list[Any]:
    values = [schema["const"]] if head == "const" else schema["enum"]
    if not isinstance(values, list) or not values:
        raise Unenforceable("'enum' must be a list with at least one value")
    kept = [value for value in values if types_of(value) & types]
    if not kept:
        raise Unenforceable(f"no value of '{head}' has the 'type' beside it")
    return kept


def _types_within(branch: Schema, types: frozenset[str]) -> bool:
    if "enum" in branch:
        return all(types_of(value) & types for value in branch["enum"])
    allowed = types | {"integer"} if "number" in types else types
    return "type" in branch and _types(branch) <= allowed


def _string(schema: Schema, _place: str) -> Schema:
    lengths = schema.keys() & {"minLength", "maxLength"}
    shapes = [name for name in ("pattern", "format") if name in schema]
    if not schema:
        return {}
    if len(shapes) > 1 or (shapes and lengths):
        raise Unenforceable(f"'{min({*shapes, *lengths} - {shapes[0]})}' beside '{shapes[0]}' is not supported")
    if lengths:
        low = _count(schema, "minLength") if "minLength" in schema else 0
        high = _count(schema, "maxLength") if "maxLength" in schema else None
        if high is not None and high < low:
            raise Unenforceable("'maxLength' is less than 'minLength'")
        return {"pattern": f"^{_PLAIN_CHARACTER}{{{low},{'' if high is None else high}}}$"}
    value = schema[shapes[0]]
    if not isinstance(value, str):
        raise Unenforceable(f"'{shapes[0]}' must be a string")
    if shapes == ["pattern"]:
        return {"pattern": written_in_json(value)}
    if value not in FORMATS:
        raise Unenforceable(f"the format '{_shown(value)}' is not supported")
    return {"pattern": _WRITTEN_FORMATS[value]} if value in _WRITTEN_FORMATS else {"format": value}


def _number(schema: Schema, _place: str) -> Schema:
    for name, value in schema.items():
        if type(value) not in (int, float):
            raise Unenforceable(f"'{name}' must be a number")
        if "e" in repr(value) or not abs(value) < 1 << 53:
            raise Unenforceable(f"'{name}' is supported up to 2^53, and not below 0.0001")
    low = max(schema.get("minimum", -inf), schema.get("exclusiveMinimum", -inf))
    high = min(schema.get("maximum", inf), schema.get("exclusiveMaximum", inf))
    if low == high and low in (schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")):
        high = -inf
    _require_room("minimum", low, high)
    return schema


def _integer(schema: Schema, place: str) -> Schema:
    """Bounds as whole numbers: with others xgrammar compiles nothing."""
    low: list[int] = []
    high: list[int] = []
    for name, value in _number(schema, place).items():
        if name.endswith("inimum"):
            low.append(floor(value) + 1 if name.startswith("exclusive") else ceil(value))
        else:
            high.append(ceil(value) - 1 if name.startswith("exclusive") else floor(value))
    _require_room("minimum", max(low, default=-inf), min(high, default=inf))
    written = {"minimum": max(low)} if low else {}
    return written | ({"maximum": min(high)} if high else {})


def _require_room(name: str, low: float, high: float) -> None:
    if low > high:
        raise Unenforceable(f"'{name}' asks for more than the other keywords allow")


def _count(schema: Schema, name: str) -> int:
    value = schema[name]
    if type(value) not in (int, float) or not 0 <= value < float("inf") or value != int(value):
        raise Unenforceable(f"'{name}' must be a whole number")
    return int(value)


def _escaped(name: str) -> str:
    """One step of a JSON pointer."""
    return name.replace("~", "~0").replace("/", "~1")


def _shown(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
