"""What the compiler makes of patterns, against Python's own engine: every short text, pattern by pattern."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from itertools import product

import pytest
import xgrammar

from flexgate.server.engine.frontend.constraints.errors import Unenforceable
from flexgate.server.engine.frontend.constraints.patterns import written_in_json, written_whole

SEEDS = 48
PATTERNS = 40
END = 256
TOKENIZER = xgrammar.TokenizerInfo([*(bytes([byte]) for byte in range(END)), b"<end>"], stop_token_ids=[END])
COMPILER = xgrammar.GrammarCompiler(TOKENIZER, max_threads=1, cache_enabled=False)

LETTERS = 'ab"\\\n\x0b -]^é'
TEXTS = ["".join(letters) for length in range(4) for letters in product(LETTERS, repeat=length)]
MEMBERS = ["a", "b", '"', "\\\\", "\\n", "\\v", "\\x0b", " ", "-", "\\]", "^", "é", "\\d", "\\s", "\\S", "\\w", "a-b"]
MEMBERS += [
    "\\x61",
    '!-"',
    "\\x00-\\x1f",
    "\\u0020-\\uffff",
    "\\-",
    "Z-a",
    '"-"',
    " -~",
    "\\D",
    "[",
    ".",
    "$",
    "|",
    "(",
    "*",
]
ATOMS = [
    "a",
    "b",
    "é",
    ".",
    " ",
    "-",
    "\\-",
    "\\n",
    "\\x61",
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


def generated(seed: int) -> Iterator[str]:
    chance = random.Random(f"patterns {seed}")
    while True:
        yield anchored(chance)


@pytest.mark.filterwarnings("ignore:Possible nested set")
@pytest.mark.sliced(6)
@pytest.mark.parametrize("seed", range(SEEDS))
def test_what_a_pattern_lets_through_is_json_and_matches_it(seed: int) -> None:
    tried = 0
    for pattern in generated(seed):
        try:
            written = written_in_json(pattern)
            reads = re.compile(pattern, re.ASCII)
        except (Unenforceable, re.error):
            continue
        for text in allowed(written):
            assert json.loads(f'"{text}"') == text, pattern
            assert reads.search(text), (pattern, text)
        tried += 1
        if tried == PATTERNS:
            break


@pytest.mark.filterwarnings("ignore:Possible nested set")
@pytest.mark.sliced(6)
@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_pattern_for_a_whole_answer_lets_through_what_matches_it_from_end_to_end(seed: int) -> None:
    tried = 0
    for pattern in generated(seed):
        try:
            written = written_whole(pattern)
            reads = re.compile(pattern, re.ASCII)
        except (Unenforceable, re.error):
            continue
        grammar = COMPILER.compile_regex(written)
        for text in TEXTS:
            assert _takes(grammar, text) == bool(reads.fullmatch(text)), (pattern, text)
        tried += 1
        if tried == PATTERNS:
            break


@pytest.mark.parametrize("pattern", [r"\x61b", r"[\x61b]b", r"\u0061b", r"[^\x00-\x1fc]b", r"\u{61}b"])
def test_a_code_ends_where_its_digits_do(pattern: str) -> None:
    assert "ab" in allowed(written_in_json(pattern))
    assert _takes(COMPILER.compile_regex(written_whole(pattern)), "ab")
