"""Schemas made of every keyword, alone, in pairs and nested, from a seed."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from flexgate.server.engine.frontend.constraints.alternatives import TYPES
from flexgate.server.engine.frontend.constraints.schemas import FORMATS

Chance = random.Random
Make = Callable[[Chance, int], Any]

NAMES = ["a", "b", "a/b", "a~", "é", "", "$ref", 'q"', "type"]
PATTERNS = [
    "^a+b$",
    "b",
    "^(ab+)?$",
    "^[^a]$",
    "^é?.$",
    '^["a]$',
    "^\\d{2,3}$",
    "^(a|b[cd]*)+$",
    "^\\S$",
    "]",
    "^a|b$",
    "",
]
NUMBERS = [0, 1, -1, 3, 0.5, -2.25, 1.0, 100, 12345, -0.001, 2**53 - 1, 1e-3, 1e20, -99.99]
VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    1.0,
    -1.5,
    1e22,
    1e-7,
    "",
    "a",
    "é",
    'q"\\\n',
    "\u2028",
    "1",
    [],
    [1, [True]],
    {},
]
VALUES += [{"a": 1, "b": [None]}, {"": 0}, 10**20, "😀", 0.1, -0.0]
REFERENCES = ["#", "#/$defs/x", "#/$defs/y", "#/$defs/a~1b", "#/properties/a", "#/items", "#/anyOf/0", "#/$defs/no"]


def a_schema(chance: Chance, depth: int) -> Any:
    """One schema; most have one or two keywords, and many of those a type."""
    if not depth or chance.random() < 0.1:
        return chance.choice(
            [True, {}, {"type": "integer"}, {"type": "string", "maxLength": 2}, {"const": "a"}, {"minimum": 3}]
        )
    first = chance.choice(sorted(KEYWORDS))
    beside = [name for name in sorted(KEYWORDS) if OF.get(name) == OF.get(first) and first in OF]
    return written(sorted({first, *chance.sample(beside, min(len(beside), chance.choice([0, 0, 1])))}), chance, depth)


def written(names: list[str], chance: Chance, depth: int) -> dict[str, Any]:
    """A schema with these keywords."""
    schema: dict[str, Any] = {name: KEYWORDS[name](chance, depth - 1) for name in names}
    if "type" not in schema and chance.random() < 0.6:
        schema["type"] = chance.choice([OF.get(name, "object") for name in names])
    if "required" in schema and chance.random() < 0.7:
        schema.setdefault("properties", {name: a_schema(chance, depth - 1) for name in schema["required"]})
    return schema


def whole(names: list[str], chance: Chance) -> dict[str, Any]:
    """A schema with these keywords, and what its references lead to."""
    schema = written(names, chance, 3)
    return schema | {"$defs": DEFINITIONS}


def _choice(values: Any) -> Make:
    return lambda chance, _depth: chance.choice(values)


def _some(values: Any, fewest: int = 0) -> Make:
    return lambda chance, _depth: chance.sample(values, chance.randint(fewest, 3))


def _schemas(chance: Chance, depth: int) -> list[Any]:
    return [a_schema(chance, depth) for _ in range(chance.randint(1, 3))]


def _named(chance: Chance, depth: int) -> dict[str, Any]:
    return {name: a_schema(chance, depth) for name in chance.sample(NAMES, chance.randint(0, 3))}


def _by_pattern(chance: Chance, depth: int) -> dict[str, Any]:
    return {chance.choice(PATTERNS[:-1]): a_schema(chance, depth)}


def _alternatives(chance: Chance, depth: int) -> list[Any]:
    if chance.random() < 0.4:
        return _schemas(chance, depth)
    if chance.random() < 0.5:
        return [{"const": value} for value in chance.sample(VALUES, 3)]
    kinds = [chance.choice(["object", ["object", "null"], None]) for _ in range(2)]
    tagged = [{"properties": {"k": {"const": tag}, "v": a_schema(chance, depth)}, "required": ["k"]} for tag in "ab"]
    return [one | ({"type": kind} if kind else {}) for one, kind in zip(tagged, kinds, strict=True)]


DEFINITIONS = {
    "x": {"type": ["integer", "null"], "minimum": 2},
    "y": {"properties": {"k": {"const": "a"}, "y": {"$ref": "#/$defs/y"}}, "required": ["k"]},
    "a/b": {"type": "string", "minLength": 1},
}
COUNTS = [0, 1, 2, 3, 2.0]
KEYWORDS: dict[str, Make] = {
    "type": lambda chance, _depth: chance.choice([*sorted(TYPES), chance.sample(sorted(TYPES), 2)]),
    **dict.fromkeys(
        ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"), _choice(COUNTS)
    ),
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), _choice(NUMBERS)),
    "pattern": _choice(PATTERNS),
    "format": _choice([*sorted(FORMATS), "regex"]),
    **dict.fromkeys(("items", "additionalProperties", "propertyNames"), a_schema),
    "prefixItems": _schemas,
    "properties": _named,
    "required": _some(NAMES),
    "patternProperties": _by_pattern,
    "const": _choice(VALUES),
    "enum": _some(VALUES, 1),
    **dict.fromkeys(("anyOf", "allOf"), _schemas),
    "oneOf": _alternatives,
    "$ref": _choice(REFERENCES),
    "uniqueItems": _choice([False]),
    "title": _choice(["t"]),
}
OF = {
    **dict.fromkeys(("minLength", "maxLength", "pattern", "format"), "string"),
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), "number"),
    **dict.fromkeys(("items", "prefixItems", "minItems", "maxItems", "uniqueItems"), "array"),
    **dict.fromkeys(("properties", "required", "additionalProperties", "patternProperties", "propertyNames"), "object"),
    **dict.fromkeys(("minProperties", "maxProperties"), "object"),
}
