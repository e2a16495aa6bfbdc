"""What a request's tools, formats and options make is bounded and enforced as a whole."""

from __future__ import annotations

import json
from typing import Any

import pytest
import xgrammar
from vllm.sampling_params import StructuredOutputsParams

from flexgate.server.engine.frontend.constraints.errors import ConstraintError
from flexgate.server.engine.frontend.constraints.made import MAX_MADE_BYTES, Constraint
from flexgate.server.engine.frontend.constraints.patterns import written_whole


def made(**params: Any) -> Constraint:
    return Constraint.made(StructuredOutputsParams(**params))


@pytest.mark.parametrize("kept", [{"minLength": 2, "maxLength": 8}, *({"format": f} for f in ("date", "time", "ipv4"))])
def test_a_schema_reaches_the_compiler_as_it_is_enforced(kept: dict[str, Any]) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", **kept}}, "required": ["a"]}
    for given in (schema, json.dumps(schema)):
        written = json.loads(made(json=given).text)
        assert written["properties"]["a"].keys() == {"type", "pattern"}


def test_any_choice_is_written_so_that_only_choices_match() -> None:
    choices = ['say "x"', "back\\slash", "line\nbreak", "tab\t", "\x01\x7f", "é😀", "", "'|\"", "\\x41"]
    constraint = made(choice=choices)
    compiler = xgrammar.GrammarCompiler(xgrammar.TokenizerInfo([bytes([i]) for i in range(256)] + [b"<end>"]))
    compiled = compiler.compile_grammar(constraint.text)
    for choice in choices:
        matcher = xgrammar.GrammarMatcher(compiled, terminate_without_stop_token=True)
        assert matcher.accept_string(choice)
        assert matcher.is_completed()
    assert not xgrammar.GrammarMatcher(compiled).accept_string("A")


def test_schemas_inside_a_structural_tag_are_written_as_enforced() -> None:
    part = {"type": "json_schema", "json_schema": {"type": "string", "maxLength": 2}}
    tag = {"type": "structural_tag", "format": {"type": "tag", "begin": "<", "content": part, "end": ">"}}
    assert "maxLength" not in made(structural_tag=json.dumps(tag)).text
    part["json_schema"] = {"not": {}}
    with pytest.raises(ConstraintError, match="'not'"):
        made(structural_tag=json.dumps(tag))


def test_a_pattern_is_made_as_the_compiler_follows_it() -> None:
    assert made(regex="a.b").text == written_whole("a.b") != "a.b"
    tag = {"type": "structural_tag", "format": {"type": "regex", "pattern": "a.b"}}
    assert json.loads(made(structural_tag=json.dumps(tag)).text)["format"]["pattern"] == written_whole("a.b")
    with pytest.raises(ConstraintError, match="look-ahead"):
        made(regex="(?=a)a")


def test_what_the_parts_make_is_bounded() -> None:
    with pytest.raises(ConstraintError, match=f"{MAX_MADE_BYTES} bytes"):
        made(json={"anyOf": [{"const": "x" * 1000}] * 200})


def test_an_object_of_any_kind_is_a_schema() -> None:
    assert json.loads(made(json_object=True).text) == {"type": "object", "additionalProperties": True}
