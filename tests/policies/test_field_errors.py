"""Errors of fields are told with their path, in words that are not Python's."""

from typing import Annotated, Any, Literal, get_args

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import core_schema

from flexgate.policies import field_errors
from flexgate.policies.field_errors import first_field_error, path_of


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    off: Literal[False] = False
    title: Annotated[str, Field(min_length=1, max_length=3)] = "a"


class Example(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    share: Annotated[float, Field(gt=0, le=1)] = 1.0
    count: Annotated[int, Field(ge=1, lt=9)] = 1
    names: Annotated[list[str], Field(min_length=2, max_length=3)] = ["a", "b"]
    mode: Literal["allow", "deny"] = "allow"
    inner: list[Inner] = []
    sizes: dict[Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")], int] = {}


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ([], "the file must be an object"),
        ({"share": 2.0}, "'share' must be at most 1"),
        ({"count": "1"}, "'count' must be an integer"),
        ({"count": 0}, "'count' must be at least 1"),
        ({"count": 9}, "'count' must be less than 9"),
        ({"names": "a"}, "'names' must be a list"),
        ({"names": ["a"]}, "'names' must have at least 2 members"),
        ({"names": list("abcd")}, "'names' must have at most 3 members"),
        ({"names": ["a", 1]}, "'names[1]' must be a string"),
        ({"mode": "x"}, "'mode' must be 'allow' or 'deny'"),
        ({"inner": [{"off": True}]}, "'inner[0].off' must be false"),
        ({"inner": [{"title": ""}]}, "'inner[0].title' must not be empty"),
        ({"inner": [{"title": "abcd"}]}, "'inner[0].title' must have at most 3 characters"),
        ({"inner": [{"tilte": "a"}]}, "'inner[0].tilte' is not a known field"),
        ({"sizes": {"x": 1}}, "'sizes.x' must be 64 characters from 0-9 and a-f"),
    ],
)
def test_an_error_is_told_with_its_path(value: Any, sentence: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Example.model_validate(value)
    assert first_field_error(caught.value).sentence("the file") == sentence


def test_only_kinds_of_errors_that_exist_have_sentences() -> None:
    told = {*field_errors._FIXED, *field_errors._BOUNDED}
    assert told <= {*get_args(core_schema.ErrorType)}


def test_a_path_is_written_as_people_write_it() -> None:
    assert path_of(("a", 0, "b", 1, 2)) == "a[0].b[1][2]"
    assert path_of(()) is None
