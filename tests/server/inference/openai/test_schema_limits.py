"""What a schema may cost before anybody looks at what it means."""

from __future__ import annotations

import json
from typing import Any

import pytest

from flexgate.server.http.errors import Invalid
from flexgate.server.inference.request import grammars, limits
from flexgate.server.inference.request.extension import parse_extension
from flexgate.server.inference.request.grammars import MAX_DEPTH, check_enforced
from flexgate.server.inference.request.items import check_responses

LONGEST = 16 * 1024
LIMITS = limits.Limits()
DEEP = 5000


def nested(depth: int, opened: str = "[", closed: str = "]") -> Any:
    """Deeper than any recursion goes; made without one."""
    value: Any = None
    for _ in range(depth):
        value = [value] if opened == "[" else {"a": value}
    return value


def with_tools(schemas: list[Any], *, flat: bool = False) -> dict[str, Any]:
    functions = [{"name": f"f{number}", "parameters": schema} for number, schema in enumerate(schemas)]
    if flat:
        tools = [{"type": "function", **function} for function in functions]
        return {"input": "x", "tool_choice": "required", "tools": tools}
    tools = [{"type": "function", "function": function} for function in functions]
    return {"messages": [{"role": "user", "content": "x"}], "tool_choice": "required", "tools": tools}


@pytest.mark.parametrize("flat", [False, True])
def test_tools_that_are_too_large_together_are_refused_before_one_is_understood(
    flat: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = 0

    def enforceable(schema: Any) -> Any:
        nonlocal read
        read += 1
        return schema

    monkeypatch.setattr(grammars, "enforceable", enforceable)
    schema = {"type": "object", "properties": {"a": {"enum": ["x" * 10_000]}}}
    check = check_responses if flat else limits.check_chat
    with pytest.raises(Invalid, match="'tools' may have at most 16384 bytes"):
        check(with_tools([schema] * 62, flat=flat), LIMITS)
    assert read == 0
    check(with_tools([schema], flat=flat), LIMITS)
    assert read == 1


@pytest.mark.parametrize("shape", ["[", "{"])
@pytest.mark.parametrize("keyword", ["enum", "default", "properties", "x"])
def test_a_schema_that_is_nested_too_deeply_is_refused(keyword: str, shape: str) -> None:
    with pytest.raises(Invalid, match=f"at most {MAX_DEPTH} levels deep") as refused:
        check_enforced({keyword: nested(DEEP, shape)}, "p", longest=LONGEST)
    assert refused.value.param == "p"
    schema = {keyword: nested(DEEP, shape)}
    with pytest.raises(Invalid, match="deep"):
        limits.check_chat(with_tools([schema]) | {"tool_choice": "auto"}, LIMITS)


def test_an_extension_that_is_nested_too_deeply_is_refused() -> None:
    for value in (nested(DEEP), nested(DEEP, "{"), {"experts": {"only": nested(DEEP)}}, {"purpose": nested(DEEP)}):
        with pytest.raises(Invalid):
            parse_extension(value)


def test_a_deep_schema_behind_many_members_is_refused_too() -> None:
    for members in (100, LONGEST, 1 << 18):
        with pytest.raises(Invalid):
            check_enforced({"enum": [nested(DEEP), *[7] * members]}, "p", longest=LONGEST)


def test_nothing_is_looked_up_in_a_schema_that_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammars, "_repeats_of_node", pytest.fail)
    for members in (LONGEST // 8, 1 << 18):
        with pytest.raises(Invalid, match=f"at most {LONGEST} bytes"):
            check_enforced({"enum": [{"pattern": "a{9}"}] * members}, "p", longest=LONGEST)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"type": "string", "type": "integer"}', "twice"),
        ('{"enum": [{"a": 1, "a": 2}]}', "twice"),
        ('{"enum": [NaN]}', "not valid JSON"),
        ('{"enum": [1e999]}', "too large"),
        ('{"enum": ["\\ud800"]}', "surrogate"),
        ("[" * 8000, "nested too deeply"),
        ("{", "not valid JSON"),
    ],
)
def test_a_schema_as_text_is_read_as_strictly_as_the_body(text: str, message: str) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "structured_outputs": {"json": text}}
    with pytest.raises(Invalid, match=message) as refused:
        limits.check_chat(body, LIMITS)
    assert refused.value.param == "structured_outputs.json"


def test_a_number_that_is_too_large_is_refused_in_every_schema() -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [float("inf")]}}}
    with pytest.raises(Invalid, match="too large"):
        limits.check_chat(with_tools([schema]) | {"tool_choice": "auto"}, LIMITS)


def test_what_is_handed_on_is_the_schema_that_was_read_as_it_is_enforced() -> None:
    text = json.dumps({"type": "string", "format": "date", "title": "day"})
    body = {"messages": [{"role": "user", "content": "x"}], "structured_outputs": {"json": text}}
    limits.check_chat(body, LIMITS)
    assert body["structured_outputs"]["json"].keys() == {"type", "pattern"}  # type: ignore[index]
