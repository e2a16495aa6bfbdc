"""What a request's tools, formats and options make is compiled as it is enforced."""

from __future__ import annotations

import json
from typing import Any

import pytest
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.structured_output.backend_xgrammar import has_xgrammar_unsupported_json_features

from flexgate.server.constraints.errors import Unenforceable
from flexgate.server.constraints.made import enforced

SCHEMAS: dict[str, dict[str, Any]] = {
    "length": {"type": "string", "minLength": 2, "maxLength": 8},
    "date": {"type": "string", "format": "date"},
    "time": {"type": "string", "format": "time"},
    "address": {"type": "string", "format": "ipv4"},
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_schema_reaches_the_compiler_as_it_is_enforced(name: str) -> None:
    schema = {"type": "object", "properties": {"a": SCHEMAS[name]}, "required": ["a"]}
    for given in (schema, json.dumps(schema)):
        written = json.loads(str(enforced(StructuredOutputsParams(json=given)).json))
        assert written["properties"]["a"].keys() == {"type", "pattern"}
        assert not has_xgrammar_unsupported_json_features(written)


def test_a_schema_that_is_not_enforced_does_not_reach_the_compiler() -> None:
    with pytest.raises(Unenforceable, match="'not'"):
        enforced(StructuredOutputsParams(json={"not": {}}))


def test_what_is_no_schema_stays_as_it_is() -> None:
    params = StructuredOutputsParams(choice=["a", "b"])
    assert enforced(params) is params


def test_schemas_in_a_parsers_own_format_are_compiled_as_they_are_enforced() -> None:
    tag = {"begin": "<call>", "content": {"type": "json_schema", "json_schema": SCHEMAS["length"]}, "end": "</call>"}
    format_ = {"type": "triggered_tags", "triggers": ["<call>"], "tags": [tag]}
    made = StructuredOutputsParams(structural_tag=json.dumps({"type": "structural_tag", "format": format_}))
    written = json.loads(str(enforced(made).structural_tag))["format"]["tags"][0]
    assert written["content"]["json_schema"].keys() == {"type", "pattern"}
    assert written["begin"] == "<call>"
