"""Whatever stands in a schema, it is taken or refused, and nothing breaks."""

from __future__ import annotations

import random
from typing import Any

from flexgate.server.engine.frontend.constraints.schemas import ANNOTATIONS, enforceable
from flexgate.server.http.errors import ApiError
from flexgate.server.inference.request.grammars import check_enforced

KEYWORDS = [
    *sorted(ANNOTATIONS),
    *("type", "properties", "required", "additionalProperties", "patternProperties", "propertyNames", "minProperties"),
    *("maxLength", "pattern", "format", "minimum", "items", "prefixItems", "maxItems", "$ref", "const", "enum"),
    *("anyOf", "oneOf", "allOf", "uniqueItems", "not"),
]
VALUES: list[Any] = [None, True, False, 0, -1, 2.5, 10**400, float("inf"), float("nan"), "", "a", "object", "string"]
VALUES += ["#", "#/$defs/a", "(", "[", "a\\", "(?", "\\u", "{9", "date"]
CASES = 20_000


def junk(chance: random.Random, depth: int) -> Any:
    shape = chance.random() if depth else 1.0
    if shape < 0.5:
        return {chance.choice(KEYWORDS): junk(chance, depth - 1) for _ in range(chance.randint(0, 3))}
    if shape < 0.6:
        return [junk(chance, depth - 1) for _ in range(chance.randint(0, 3))]
    return chance.choice(VALUES)


def test_junk_is_taken_or_refused() -> None:
    chance, taken = random.Random(5), 0
    for _ in range(CASES):
        schema = {"type": chance.choice(["object", "array", "string"]), chance.choice(KEYWORDS): junk(chance, 3)}
        try:
            enforceable(check_enforced(schema, "p", longest=1 << 14))
            taken += 1
        except ApiError:
            continue
    assert 0 < taken < CASES
