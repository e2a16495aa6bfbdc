"""What the compiler makes of patterns, against Python's own engine: every short text, pattern by pattern."""

from __future__ import annotations

import json
import random
import re
from itertools import product

import pytest
import xgrammar

from flexgate.server.engine.frontend.constraints.errors import Unenforceable
from flexgate.server.engine.frontend.constraints.patterns import written_in_json

SEEDS = 48
PATTERNS = 40
END = 256
TOKENIZER = xgrammar.TokenizerInfo([*(bytes([byte]) for byte in range(END)), b"<end>"], stop_token_ids=[END])
COMPILER = xgrammar.GrammarCompiler(TOKENIZER, max_threads=1, cache_enabled=False)

LETTERS = 'ab"\\\n\x0b -]^é'
TEXTS = ["".join(letters) for length in range(4) for letters in product(LETTERS, repeat=length)]
MEMBERS = ["a", "b", '"', "\\\\", "\\n", "\\v", "\\x0b", " ", "-", "\\]", "^", "é", "\\d", "\\s", "\\S", "\\w", "a-b"]
MEMBERS += ['!-"', "\\x00-\\x1f", "\\u0020-\\uffff", "\\-", "Z-a", '"-"', " -~", "\\D", "[", ".", "$", "|", "(", "*"]
ATOMS = [
    "a",
    "b",
    "é",
    ".",
    " ",
    "-",
    "\\-",
    "\\n",
    '"',
    "\\\\",
    "\\d",
    "\\s",
    "\\S",
    "\\D",
    "\\^",
    "\\]",
    "]",
    "}",
    "^",
]
COUNTS = ["", "", "", "*", "+", "?", "??", "*?", "{2}", "{1,2}", "{0,1}?", "{2,}", "**", "?+", "{,2}", "{"]


def a_class(chance: random.Random) -> str:
    members = "".join(chance.choice(MEMBERS) for _ in range(chance.choice([1, 1, 2, 3])))
    return f"[{chance.choice(['', '', '^'])}{members}]"


def an_atom(chance: random.Random, depth: int) -> str:
    shape = chance.random()
    if depth and shape < 0.25:
        return f"{chance.choice(['(', '(?:', '(?P<n>'])}{a_pattern(chance, depth - 1)})"
    return a_class(chance) if shape < 0.6 else chance.choice(ATOMS)


def a_pattern(chance: random.Random, depth: int) -> str:
    branches = (
        "".join(an_atom(chance, depth) + chance.choice(COUNTS) for _ in range(chance.choice([0, 1, 1, 2])))
        for _ in range(chance.choice([1, 1, 1, 2]))
    )
    return "|".join(branches)


def anchored(chance: random.Random) -> str:
    return chance.choice(["", "^"]) + a_pattern(chance, 2) + chance.choice(["", "$", "$", "$|^b"])


def allowed(pattern: str) -> list[str]:
    """The texts that the compiler lets an answer have inside its quotes."""
    schema = json.dumps({"type": "string", "pattern": pattern})
    grammar = COMPILER.compile_json_schema(schema, any_whitespace=False, separators=(",", ":"))
    return [text for text in TEXTS if _takes(grammar, f'"{text}"')]


def _takes(grammar: xgrammar.CompiledGrammar, text: str) -> bool:
    matcher = xgrammar.GrammarMatcher(grammar)
    return bool(matcher.accept_string(text)) and matcher.accept_token(END)


@pytest.mark.filterwarnings("ignore:Possible nested set")
@pytest.mark.sliced(6)
@pytest.mark.parametrize("seed", range(SEEDS))
def test_what_a_pattern_lets_through_is_json_and_matches_it(seed: int) -> None:
    chance, tried = random.Random(f"patterns {seed}"), 0
    while tried < PATTERNS:
        pattern = anchored(chance)
        try:
            written = written_in_json(pattern)
            reads = re.compile(pattern, re.ASCII)
        except (Unenforceable, re.error):
            continue
        tried += 1
        for text in allowed(written):
            assert json.loads(f'"{text}"') == text, pattern
            assert reads.search(text), (pattern, text)
