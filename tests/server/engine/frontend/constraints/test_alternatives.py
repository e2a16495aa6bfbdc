"""Alternatives that exclude one another: what an answer to 'oneOf' may be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from flexgate.server.engine.frontend.constraints.alternatives import canonical
from flexgate.server.engine.frontend.constraints.errors import Unenforceable
from flexgate.server.engine.frontend.constraints.schemas import enforceable


def tagged(value: Any, **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"k": {"const": value}}, "required": ["k"]} | more


def referring(*branches: Any) -> dict[str, Any]:
    """The branches as definitions, which is how pydantic writes a discriminated union."""
    names = [f"b{number}" for number in range(len(branches))]
    definitions = dict(zip(names, branches, strict=True))
    return {"oneOf": [{"$ref": f"#/$defs/{name}"} for name in names], "$defs": definitions}


APART: list[list[Any]] = [
    [{"const": "a", "title": "A"}, {"const": "b", "title": "B"}],
    [{"const": 1}, {"const": True}, {"enum": [0, "1"]}, {"type": "null"}],
    [tagged("a"), tagged("b"), {"type": "integer"}],
    [tagged("a", type=["object", "null"]), tagged("b")],
    [{"properties": {"k": {"const": tag}}, "required": ["k"]} for tag in "ab"],
    [tagged([1, {"x": 1}]), tagged([1, {"x": True}])],
]
TOGETHER: list[tuple[list[Any], Any]] = [
    ([tagged("a", type=["object", "null"]), tagged("b", type=["object", "null"])], None),
    ([tagged("a"), tagged("a")], {"k": "a"}),
    ([{"const": 1}, {"const": 1.0}], 1),
    ([{"const": {"a": [1]}}, {"enum": [2, {"a": [1.0]}]}], {"a": [1]}),
    ([{"maxLength": 2}, {"type": "integer"}], 5),
    ([{"properties": {"k": {"const": "a"}}, "required": ["k"]}, {"const": 5}], 5),
    ([{"type": "integer"}, {"type": "number"}], 5),
    ([{}, {"type": "null"}], None),
]


@pytest.mark.parametrize("branches", APART)
def test_alternatives_that_exclude_one_another_are_enforced(branches: list[Any]) -> None:
    for schema in ({"oneOf": branches}, referring(*branches)):
        assert enforceable(schema)


@pytest.mark.parametrize(("branches", "both"), TOGETHER)
def test_alternatives_that_share_an_answer_are_refused(branches: list[Any], both: Any) -> None:
    for schema in ({"oneOf": branches}, referring(*branches)):
        assert not Draft202012Validator(schema).is_valid(both)
        with pytest.raises(Unenforceable, match="'oneOf'"):
            enforceable(schema)


@pytest.mark.parametrize("target", ["#", "#/oneOf/1"])
def test_an_alternative_that_refers_to_alternatives_is_refused(target: str) -> None:
    with pytest.raises(Unenforceable, match="'oneOf'"):
        enforceable({"oneOf": [{"$ref": target}, {"type": "null"}]})


class Counted(int):
    """Counts how often it is compared or hashed, in all its copies."""

    __slots__ = ()
    looks = 0

    def __eq__(self, other: object) -> bool:
        Counted.looks += 1
        return int.__eq__(self, other)

    def __hash__(self) -> int:
        Counted.looks += 1
        return int.__hash__(self)


def _branches(values: Iterator[Any], many: int, each: int) -> Iterator[Any]:
    for _ in range(many):
        yield {"type": "object", "properties": {"k": {"enum": [next(values) for _ in range(each)]}}, "required": ["k"]}


@pytest.mark.parametrize("wrap", [lambda schema: schema, lambda schema: schema["properties"]["k"]])
@pytest.mark.parametrize("refer", [False, True])
def test_each_value_is_looked_at_a_few_times_however_many_alternatives_there_are(wrap: Any, refer: bool) -> None:
    Counted.looks, many, each = 0, 25, 100
    values = (Counted(number) for number in range(many * each))
    branches = [wrap(branch) for branch in _branches(values, many, each)]
    enforceable(referring(*branches) if refer else {"oneOf": branches})
    assert many * each <= Counted.looks <= 6 * many * each


def test_equal_json_values_are_one_and_others_are_not() -> None:
    equal = [(1, 1.0), ([1, {"a": 2.0}], [1.0, {"a": 2}]), ({"a": 1, "b": 2}, {"b": 2, "a": 1})]
    other = [(1, True), (0, False), ("1", 1), ([], {}), ([1], [True]), (["boolean", 1], True), (None, "null")]
    for one, two in equal:
        assert canonical(one) == canonical(two)
    for one, two in other:
        assert canonical(one) != canonical(two)
