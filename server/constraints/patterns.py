"""Which regular expressions xgrammar follows to the letter.

It ignores look-ahead, takes ``\\A`` for a letter, and matches the whole text with anchors read
away wherever they stand. Inside a JSON string it writes a quote or a control character as it is, which ends the string.
"""

from __future__ import annotations

import re
from typing import Final

from flexgate.server.constraints.errors import Unenforceable

_CLASSES: Final = frozenset("dDwWsS")
_CONTROLS: Final = {"t": "\t", "n": "\n", "r": "\r", "f": "\f", "v": "\v"}
_CODE: Final = re.compile(r"x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|u\{([0-9a-fA-F]{1,6})\}")
_GROUP: Final = re.compile(r"\(\?(?::|P?<[A-Za-z_]\w*>)")
_LOOK: Final = re.compile(r"\(\?<?[=!]")
_FIRST_PRINTABLE: Final = 0x20


def check_pattern(pattern: str, *, in_json: bool) -> None:
    """Refuse what xgrammar ignores or reads in another way; raises `Unenforceable`.

    Args:
        in_json: the text is the inside of a JSON string.
    """
    position, depth, in_class = 0, 0, False
    while position < len(pattern):
        char = pattern[position]
        if char == "\\":
            position += _escape(pattern, position, in_json=in_json and not in_class)
            continue
        if in_class:
            in_class = char != "]"
        elif char == "[":
            in_class = True
            position += pattern.startswith("[^", position)
        elif char == "(":
            position += _group(pattern, position)
            depth += 1
            continue
        else:
            depth -= char == ")"
            _check_anchor(pattern, position, depth)
            _check_literal(char, in_json=in_json)
        position += 1


def _group(pattern: str, position: int) -> int:
    """Length of what opens a group."""
    if not pattern.startswith("(?", position):
        return 1
    if _LOOK.match(pattern, position):
        raise Unenforceable("look-ahead and look-behind in a pattern are not enforced")
    opened = _GROUP.match(pattern, position)
    if opened is None:
        raise Unenforceable("flags and conditions in a pattern are not enforced")
    return opened.end() - position


def _escape(pattern: str, position: int, *, in_json: bool) -> int:
    """Length of an escape."""
    name = pattern[position + 1 : position + 2]
    if name in _CLASSES or not name.isalnum():
        _check_literal("" if name in _CLASSES else name, in_json=in_json)
        return 2
    code = _CODE.match(pattern, position + 1)
    if code is not None:
        number = int(next(filter(None, code.groups())), 16)
        _check_literal(chr(min(number, 0x10FFFF)), in_json=in_json)
        return 1 + code.end() - code.start()
    if name not in _CONTROLS:
        raise Unenforceable(f"'\\{name}' in a pattern is not enforced")
    _check_literal(_CONTROLS[name], in_json=in_json)
    return 2


def _check_anchor(pattern: str, position: int, depth: int) -> None:
    char = pattern[position]
    outer = depth == 0
    if char == "^" and not (position == 0 or (outer and pattern[position - 1] == "|")):
        raise Unenforceable("'^' in a pattern is enforced at its start only")
    if char == "$" and not (position == len(pattern) - 1 or (outer and pattern[position + 1] == "|")):
        raise Unenforceable("'$' in a pattern is enforced at its end only")


def _check_literal(char: str, *, in_json: bool) -> None:
    if in_json and char and (char in '"\\' or ord(char) < _FIRST_PRINTABLE):
        raise Unenforceable("a pattern may not ask for quotes, backslashes or control characters, which JSON escapes")
