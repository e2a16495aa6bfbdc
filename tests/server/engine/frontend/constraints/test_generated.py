"""Every keyword alone, beside every other and nested: what the compiler lets through satisfies the schema."""

from __future__ import annotations

import json
import random
from itertools import combinations
from typing import Any

import pytest
from generated_schemas import KEYWORDS, whole
from jsonschema import Draft202012Validator
from sampled_answers import COMPILER, sample

from flexgate.server.engine.frontend.constraints.errors import Unenforceable
from flexgate.server.engine.frontend.constraints.schemas import enforceable

SEEDS = 32
ANSWERS = 4
OF_ONE_SEED = 140
"""Of about 400 sets of keywords; `SEEDS` of them try each set a dozen times."""


def _compiled(schema: Any) -> Any:
    """As production compiles it: written once by the door and once more on its way into the engine."""
    written = enforceable(schema)
    assert enforceable(written) == written
    return COMPILER.compile_json_schema(json.dumps(written), any_whitespace=False, separators=(",", ":"))


@pytest.mark.sliced(3)
@pytest.mark.parametrize("seed", range(SEEDS))
def test_what_is_enforced_holds_for_every_answer(seed: int) -> None:
    chance, taken = random.Random(f"schemas {seed}"), 0
    sets = [*([name] for name in KEYWORDS), *map(list, combinations(sorted(KEYWORDS), 2))]
    for names in chance.sample(sets, OF_ONE_SEED):
        schema = whole(names, chance)
        try:
            grammar = _compiled(schema)
        except Unenforceable:
            continue
        validator = Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)
        answers = [sample(grammar, chance) for _ in range(ANSWERS)]
        taken += any(answer is not None for answer in answers)
        for answer in filter(None, answers):
            assert validator.is_valid(json.loads(answer)), (schema, answer)
    assert taken > OF_ONE_SEED // 5
