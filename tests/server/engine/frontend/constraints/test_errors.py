"""What a compiler says reaches clients without what is its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import xgrammar

from flexgate.server.engine.frontend.constraints.errors import compiler_message

UNREADABLE: dict[str, tuple[Callable[[str], Any], str, str]] = {
    "group": (xgrammar.Grammar.from_regex, "(a", "at position 3: The parenthesis is not closed"),
    "count": (xgrammar.Grammar.from_regex, "a{3,1}", "lower bound is larger than upper bound: 3 > 1"),
    "rule": (xgrammar.Grammar.from_ebnf, "root ::= foo", 'rule "foo" is not defined'),
    "range": (
        xgrammar.Grammar.from_json_schema,
        '{"type": "integer", "minimum": 5, "maximum": 3}',
        "invalid range: minimum greater than maximum",
    ),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_compiler_names_what_is_wrong_and_no_file_of_its_own(name: str) -> None:
    compile_text, text, message = UNREADABLE[name]
    with pytest.raises(RuntimeError) as raised:
        compile_text(text)
    assert compiler_message(str(raised.value)) == message


@pytest.mark.parametrize("said", ["", "[01:02:03] /a/b.cc:7: ", "Check failed: (i < n)", "[01:02:03] b.cc:7: x::y"])
def test_what_is_only_the_compilers_own_is_not_told(said: str) -> None:
    assert compiler_message(said) == "it cannot be compiled"
