"""What the compiler enforces: sampled answers against an independent validator, keyword by keyword."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
import xgrammar
from generated_schemas import KEYWORDS
from jsonschema import Draft202012Validator
from sampled_answers import COMPILER, sample

from flexgate.server.engine.frontend.constraints.errors import Unenforceable
from flexgate.server.engine.frontend.constraints.schemas import ANNOTATIONS, FORMATS, UNENFORCED, enforceable

SAMPLES = 40

AB: dict[str, Any] = {"a": {"type": "string"}, "b": {"type": "integer"}}
NAMES = {"pattern": "^[a-c]{2}$"}
ENFORCED: list[Any] = [
    True,
    {},
    {"type": "object"},
    {"type": "object", "properties": {}},
    {"type": "object", "properties": AB, "required": ["a"]},
    {"properties": AB, "required": ["a"], "title": "no type"},
    {"type": "object", "properties": AB, "additionalProperties": False},
    {"type": "object", "properties": AB, "additionalProperties": True},
    {"type": "object", "properties": AB, "additionalProperties": {"type": "integer"}},
    {"type": "object", "additionalProperties": {"type": "integer"}},
    {"type": "object", "properties": {}, "additionalProperties": {"type": "integer"}},
    {"additionalProperties": False},
    {"type": "object", "properties": AB, "minProperties": 2},
    {"type": "object", "properties": AB, "maxProperties": 1, "required": ["b"]},
    {"type": "object", "minProperties": 1, "maxProperties": 2},
    {"type": "object", "patternProperties": {"^x": {"type": "integer"}}},
    {"type": "object", "patternProperties": {"^x": {"type": "integer"}}, "additionalProperties": True},
    {"type": "object", "propertyNames": NAMES},
    {"type": "object", "propertyNames": {"enum": ["a", "b"]}, "additionalProperties": {"type": "null"}},
    {"type": "object", "propertyNames": {"maxLength": 2}},
    {"type": "object", "propertyNames": {}},
    {"type": "object", "propertyNames": {"enum": ["a", 1, None]}},
    {"type": "object", "propertyNames": {"type": ["string", "integer"], "maxLength": 2}},
    {"type": "object", "properties": AB, "required": ["a", "a"], "maxProperties": 1},
    {"type": "string", "pattern": "^a(\\.b+)?$"},
    {"type": "string", "pattern": "^é.?[^ü]$"},
    {"type": "string"},
    {"type": "string", "minLength": 2, "maxLength": 4},
    {"type": "string", "minLength": 3},
    {"type": "string", "maxLength": 2},
    {"maxLength": 2},
    {"type": ["integer", "string"], "minimum": 3, "maxLength": 2},
    *({"type": "string", "format": name} for name in sorted(FORMATS)),
    *(
        {"type": "string", "pattern": pattern}
        for pattern in (
            *("^a+b$", "ab", "a|bc", "^a|b$", "^(?:ab|c)$", "^\\d+\\s\\w*$", "^\\D\\S\\W$", "^.{2,3}$", "^a*?b+?$"),
            *("^[^a]$", "^(?P<x>a)$", "^[\\d-]+\\.\\/$", "^\\u0041\\x41$", "^[ -~]{3}$", '^["a]{2}$', "", "^(a|)$"),
            *("^[a-z]{1,64}@[a-z]{1,255}$", "^[a-zA-Z0-9._%+-]{1,64}@[a-zA-Z0-9.-]{1,255}\\.[a-z]{2,}$"),
        )
    ),
    {"type": "integer"},
    {"type": "number"},
    {"type": "boolean"},
    {"type": "null"},
    {"minimum": 3},
    {"type": "integer", "minimum": 3, "maximum": 17},
    {"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 6},
    {"type": "integer", "minimum": -5, "maximum": 5.0},
    {"type": "integer", "minimum": 0.5, "exclusiveMinimum": 1.5, "maximum": 4.5},
    {"type": "integer", "exclusiveMinimum": -2.5, "exclusiveMaximum": 2.0},
    {"type": ["integer", "number"], "minimum": 0.5},
    {"type": ["integer", "null"], "minimum": 0.5},
    {"type": "number", "minimum": -0.5, "exclusiveMaximum": 2.25},
    {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    {"type": "number", "maximum": -1.5},
    {"enum": ["a", 1, None, True, [1], {"b": 2}, "é\n"]},
    {"type": "integer", "enum": ["a", 1]},
    {"type": ["string", "null"], "const": "a"},
    {"const": {"a": [1, 2]}},
    {"anyOf": [{"type": "string"}, {"type": "integer"}]},
    {"type": "object", "anyOf": [{"type": "object", "properties": AB}, {"properties": {"c": {}}}]},
    {"oneOf": [{"type": "string"}, {"type": "integer"}]},
    {"oneOf": [{"properties": {"k": {"const": tag}, tag: {}}, "required": ["k"]} for tag in "ab"]},
    {"allOf": [{"$ref": "#/$defs/x"}], "$defs": {"x": {"type": "integer"}}, "description": "pydantic's"},
    {"type": "array"},
    {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 3},
    {"items": {"type": "integer"}, "minItems": 1},
    {"type": "array", "items": False},
    {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}]},
    {"type": "array", "prefixItems": [{"type": "integer"}], "items": {"type": "null"}, "minItems": 2, "maxItems": 4},
    {"type": "array", "uniqueItems": False},
    {"$ref": "#/$defs/n", "$defs": {"n": {"type": "object", "properties": {"n": {"$ref": "#/$defs/n"}}}}},
    {"properties": {"a": {"type": "integer"}, "b": {"$ref": "#/properties/a"}}, "required": ["a", "b"]},
    {"type": "string", "x-unit": "kg", "nullable": True},
]

REFUSED: list[tuple[Any, str]] = [
    ({"not": {"type": "null"}}, "not"),
    ({"type": "object", "properties": AB, "anyOf": [{"required": ["a"]}, {"required": ["b"]}]}, "anyOf"),
    ({"type": "object", "required": ["a"]}, "required"),
    ({"required": ["a"]}, "required"),
    ({"type": "object", "properties": AB, "required": ["z"]}, "required"),
    ({"type": "object", "properties": AB, "patternProperties": {"^x": {}}}, "patternProperties"),
    ({"type": "object", "properties": AB, "propertyNames": NAMES}, "propertyNames"),
    ({"type": "object", "patternProperties": {"^x": {}, "y$": {}}}, "patternProperties"),
    ({"type": "object", "propertyNames": NAMES, "minProperties": 2}, "minProperties"),
    ({"type": "object", "propertyNames": {"const": None}}, "const"),
    ({"type": "object", "propertyNames": {"type": "integer"}}, "propertyNames"),
    ({"type": "object", "propertyNames": {"$ref": "#/$defs/x"}, "$defs": {"x": {"type": "integer"}}}, "$ref"),
    ({"properties": {}, "minProperties": 2}, "minProperties"),
    ({"additionalProperties": False, "minProperties": 1}, "minProperties"),
    ({"properties": AB, "required": ["a", "b"], "maxProperties": 1}, "required"),
    ({"type": "array", "prefixItems": [{}, {}], "maxItems": 1}, "prefixItems"),
    ({"type": "array", "prefixItems": [{}], "minItems": 2}, "minItems"),
    ({"type": "array", "minItems": 3, "maxItems": 2}, "minItems"),
    ({"type": "number", "minimum": 1, "exclusiveMaximum": 1.0}, "minimum"),
    ({"type": "integer", "minimum": 0.5, "maximum": 0.75}, "minimum"),
    ({"type": "string", "pattern": "^(?!ab)[ab]{2}$"}, "look-ahead"),
    ({"type": "object", "patternProperties": {"^(?=ab)[ab]{2}$": {}}}, "look-ahead"),
    ({"type": "string", "pattern": "(?<=a)b"}, "look-behind"),
    ({"type": "string", "pattern": "(?i)ab"}, "flags"),
    ({"type": "string", "pattern": "a^b"}, "'^'"),
    ({"type": "string", "pattern": "(a$)b"}, "'$'"),
    ({"type": "string", "pattern": "\\Aab\\Z"}, "\\A"),
    ({"type": "string", "pattern": "^(a)\\1$"}, "\\1"),
    ({"type": "string", "pattern": "^\\bab$"}, "\\b"),
    ({"type": "string", "pattern": "^a\\n$"}, "JSON escapes"),
    ({"type": "string", "pattern": '^"a$'}, "JSON escapes"),
    ({"type": "string", "pattern": "^\\u0022$"}, "JSON escapes"),
    *(
        ({"type": "string", "pattern": f"^{some}$"}, "JSON escapes")
        for some in (
            *(
                '["]',
                '["""]',
                '["-"]',
                "[\\\\]",
                "[\\n]",
                "[\\x0a]",
                "[\\t]",
                "[\\u0022\\u005c]",
                "[\\x00-\\x1f]",
                '["]{2}',
                'x["]',
            ),
            *("[\\f\\v]", "[^\\x20-\\u{10ffff}]", "[^\\s!#-[\\]-\\u{10ffff}]"),
        )
    ),
    ({"type": "string", "pattern": "^[^]a]$"}, "empty class"),
    ({"type": "string", "pattern": "^[a"}, "not closed"),
    ({"type": "string", "pattern": "^[z-a]$"}, "range"),
    ({"type": "string", "pattern": "^[\\b]$"}, "\\b"),
    ({"type": "string", "pattern": "^[\\p{L}]$"}, "\\p"),
    ({"type": "string", "pattern": "^\\ud83d$"}, "not a Unicode character"),
    ({"type": "string", "pattern": "^[\\ud800-\\udfff]$"}, "not a Unicode character"),
    ({"type": "string", "pattern": "^(a$"}, "group"),
    ({"type": "string", "pattern": "^(a"}, "group"),
    ({"type": "string", "pattern": "a)(b"}, "group"),
    *(
        ({"type": "string", "pattern": f"^a{counts}$"}, "quantifier")
        for counts in ("**", "++", "?+", "{1}{2}", "{2}+", "{,2}")
    ),
    ({"type": "string", "pattern": "*a"}, "quantifier"),
    ({"type": "string", "pattern": "^(ab+|c){2,}$"}, "after a group"),
    ({"type": "string", "pattern": "^a+$", "minLength": 2}, "minLength"),
    ({"type": "string", "format": "uuid", "maxLength": 2}, "maxLength"),
    ({"type": "string", "format": "json-pointer"}, "json-pointer"),
    ({"type": "string", "minLength": 3, "maxLength": 2}, "maxLength"),
    ({"type": "number", "minimum": 1e-9}, "minimum"),
    ({"type": "number", "multipleOf": 5}, "multipleOf"),
    ({"minLength": 3, "minimum": 3}, "type"),
    ({"enum": ["a", "bb"], "maxLength": 1}, "maxLength"),
    ({"type": "string", "const": 1}, "const"),
    ({"enum": []}, "enum"),
    ({"type": "string", "anyOf": [{"type": "string"}, {"type": "integer"}]}, "anyOf"),
    ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, "oneOf"),
    ({"oneOf": [{"type": "string", "maxLength": 3}, {"type": "string", "minLength": 2}]}, "oneOf"),
    ({"allOf": [{"type": "string"}, {"maxLength": 2}]}, "allOf"),
    ({"allOf": [{"type": "object", "properties": AB}], "required": ["a"]}, "required"),
    ({"type": "array", "items": {"enum": [1, 2]}, "uniqueItems": True}, "uniqueItems"),
    ({"type": "array", "contains": {"type": "integer"}}, "contains"),
    ({"$ref": "#/$defs/x", "minimum": 3, "$defs": {"x": {"type": "integer"}}}, "minimum"),
    ({"$ref": "#foo", "$defs": {"x": {"$anchor": "foo"}}}, "$"),
    ({"$ref": "#/$defs/y", "$defs": {"x": {}}}, "$ref"),
    ({"$ref": "#/x-hidden", "x-hidden": {"not": {}}}, "$ref"),
    ({"$ref": "http://127.0.0.1/x"}, "$ref"),
    ({"type": "object", "properties": AB, "if": {"required": ["a"]}, "then": {"required": ["b"]}}, "if"),
    ({"type": "object", "properties": AB, "dependentRequired": {"a": ["b"]}}, "dependentRequired"),
    ({"type": "any"}, "any"),
    (False, "false"),
    ({"type": "object", "properties": {"a": {"properties": {"b": {"not": {}}}}}}, "not"),
    *(({"type": "object", name: {}}, name) for name in sorted(UNENFORCED)),
]


def compiled(schema: Any) -> xgrammar.CompiledGrammar:
    text = json.dumps(enforceable(schema))
    return COMPILER.compile_json_schema(text, any_whitespace=False, separators=(",", ":"))


@pytest.mark.parametrize("schema", ENFORCED, ids=lambda schema: json.dumps(schema)[:70])
def test_every_sampled_answer_satisfies_the_schema(schema: Any) -> None:
    grammar, chance = compiled(schema), random.Random(7)
    validator = Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)
    answers = [answer for _ in range(SAMPLES) if (answer := sample(grammar, chance)) is not None]
    assert answers
    for answer in answers:
        validator.validate(json.loads(answer))


@pytest.mark.parametrize("schema", ENFORCED, ids=lambda schema: json.dumps(schema)[:70])
def test_what_is_written_is_written_the_same_again(schema: Any) -> None:
    """Schemas of tools are written alone first and within the schema of a call then."""
    assert enforceable(enforceable(schema)) == enforceable(schema)


@pytest.mark.parametrize(("schema", "named"), REFUSED, ids=lambda part: json.dumps(part)[:70])
def test_what_is_not_enforced_is_refused_by_name(schema: Any, named: str) -> None:
    with pytest.raises(Unenforceable) as refused:
        enforceable(schema)
    assert named in str(refused.value)


def test_every_keyword_of_the_standard_is_in_one_list() -> None:
    vocabularies = Draft202012Validator.META_SCHEMA["allOf"]
    assert vocabularies
    known = {name for schema in ENFORCED if isinstance(schema, dict) for name in schema}
    standard = set(Draft202012Validator.VALIDATORS) | {"default", "examples", "deprecated", "$anchor", "$id", "$schema"}
    assert standard <= known | UNENFORCED | ANNOTATIONS


def test_every_keyword_that_is_enforced_is_generated() -> None:
    known = {name for schema in ENFORCED if isinstance(schema, dict) for name in schema}
    assert known - ANNOTATIONS - UNENFORCED - {"x-unit", "nullable"} <= KEYWORDS.keys()
