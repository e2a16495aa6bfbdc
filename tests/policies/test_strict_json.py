"""A key that is given twice is refused, in one pass over the object."""

from __future__ import annotations

import json
from typing import Any

import pytest

from flexgate.policies.strict_json import no_key_twice, repeated_key


class Counted(str):
    """A key that counts how often it is compared or hashed."""

    seen = 0

    def __hash__(self) -> int:
        Counted.seen += 1
        return super().__hash__()

    def __eq__(self, other: object) -> bool:
        Counted.seen += 1
        return super().__eq__(other)


def test_the_first_key_that_comes_again_is_named() -> None:
    assert json.loads('{"a": {"b": 1}, "b": 2}', object_pairs_hook=no_key_twice) == {"a": {"b": 1}, "b": 2}
    for text, key in (('{"a": 1, "b": 2, "b": 3, "a": 4}', "b"), ('[{"x": {"": 1, "": 1}}]', "")):
        with pytest.raises(json.JSONDecodeError, match=f"the key '{key}' is given twice"):
            json.loads(text, object_pairs_hook=no_key_twice)


def test_what_it_costs_grows_with_the_object_and_not_with_its_square() -> None:
    def cost(keys: int) -> int:
        pairs: list[tuple[str, Any]] = [(Counted(number), 0) for number in range(keys)]
        Counted.seen = 0
        assert repeated_key([*pairs, pairs[-1]]) == pairs[-1][0]
        return Counted.seen

    assert cost(2_000) <= 4 * cost(1_000)
    assert cost(1_000) < 10_000
