"""Which regular expressions xgrammar follows to the letter.

It ignores look-ahead, takes ``\\A`` for a letter, repeats what is possessive elsewhere, and matches the whole text with
anchors read away wherever they stand. Inside a JSON string it writes a quote or a control character as it is, which
ends the string: of a class it leaves those out, but not where nothing else is in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from string import hexdigits
from typing import Final, NoReturn

from flexgate.server.engine.frontend.constraints.errors import Unenforceable

Ranges = list[tuple[int, int]]

_CONTROLS: Final = {"t": "\t", "n": "\n", "r": "\r", "f": "\f", "v": "\v"}
_CODE: Final = re.compile(r"x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|u\{([0-9a-fA-F]{1,6})\}")
_GROUP: Final = re.compile(r"\(\?(?::|P?<[A-Za-z_]\w*>)", re.ASCII)
_LOOK: Final = re.compile(r"\(\?<?[=!]")
_COUNT: Final = re.compile(r"(?:[*+?]|\{[0-9]+(?:,[0-9]*)?\})\??")
_COUNTS: Final = frozenset("*+?{")
_COUNTS_OF_GROUPS: Final = {"?": "{0,1}", "{0,}": "*", "{1,}": "+"}
_LAST: Final = 0x10FFFF
_SURROGATES: Final = range(0xD800, 0xE000)
_NO_LINE_END: Final = "[^\\u{a}\\u{d}\\u{2028}\\u{2029}]"
_WRITTEN_AS_THEY_ARE: Final[Ranges] = [(0x20, 0x21), (0x23, 0x5B), (0x5D, _LAST)]
"""Characters of a JSON string that need no escape: neither quotes nor backslashes nor control characters."""


def written_in_json(pattern: str) -> str:
    """A pattern for the inside of a JSON string as xgrammar follows it, whose every text matches `pattern`.

    Written in another way is what it reads wrongly: an optional group, of which it takes a repeated end or beginning
    alone; and brackets and characters beyond ASCII, beside which it reads every class with quotes and controls in it.

    Raises:
        Unenforceable: it is not followed in any form.
    """
    return "".join(_written(pattern, in_json=True))


def written_whole(pattern: str) -> str:
    """A pattern for a whole text as xgrammar follows it, whose every text `pattern` matches from end to end.

    Written in another way is also what it reads wrongly only here: `.`, which it takes for line ends, too.

    Raises:
        Unenforceable: it is not followed in any form.
    """
    return "".join(_written(pattern, in_json=False))


def _written(pattern: str, *, in_json: bool) -> Iterator[str]:
    position, depth, counted = 0, 0, ""
    while position < len(pattern):
        char, begin = pattern[position], position
        if char in _COUNTS:
            if not counted:
                raise Unenforceable("a quantifier in a pattern must follow one element, and no other quantifier")
            position = _after_count(pattern, position)
            text = pattern[begin:position]
            yield _count_of_group(text) if counted == ")" else text
            counted = ""
            continue
        counted = "" if char in "(|^$" else char
        if char == "\\":
            written, position = _escape(pattern, position, in_json=in_json)
        elif char == "[":
            written, position = _class(pattern, position, in_json=in_json)
        elif char == "(":
            position += _group(pattern, position)
            depth += 1
            written = "("
        else:
            depth -= char == ")"
            _check_anchor(pattern, position, depth)
            _check_literal(char, in_json=in_json)
            position += 1
            written = char if char.isascii() and char not in "]}" else _literal(char)
        if depth < 0 or (depth > 0 and position == len(pattern)):
            raise Unenforceable("a pattern must close every group that it opens, and no other")
        yield _NO_LINE_END if written == "." and not in_json else written


def _literal(char: str) -> str:
    """One character: of its code, xgrammar would take digits that follow a short one for its own."""
    if char.isascii() and char.isalnum():
        return char
    return f"\\{char}" if "!" <= char <= "~" else _coded(ord(char))


def _coded(code: int) -> str:
    return f"\\u{{{code:x}}}"


def _after_count(pattern: str, position: int) -> int:
    count = _COUNT.match(pattern, position)
    if count is None:
        raise Unenforceable(
            "'{' in a pattern must open a quantifier: '{2}', '{2,}' or '{2,4}'; a brace itself is '\\{'"
        )
    return count.end()


def _count_of_group(count: str) -> str:
    written = _COUNTS_OF_GROUPS.get(count.removesuffix("?") or count, count)
    if written.endswith(",}"):
        raise Unenforceable(
            f"'{count}' after a group in a pattern is not supported: use '{{2}}', '{{2,4}}', '*' or '+'"
        )
    return written


def _group(pattern: str, position: int) -> int:
    """Length of what opens a group."""
    if not pattern.startswith("(?", position):
        return 1
    if _LOOK.match(pattern, position):
        raise Unenforceable("look-ahead and look-behind in a pattern are not supported")
    opened = _GROUP.match(pattern, position)
    if opened is None:
        raise Unenforceable("flags and conditions in a pattern are not supported")
    return opened.end() - position


def _escape(pattern: str, position: int, *, in_json: bool) -> tuple[str, int]:
    if pattern[position + 1 : position + 2] in _SETS:
        return pattern[position : position + 2], position + 2
    char, after = _escaped(pattern, position)
    _check_literal(char, in_json=in_json)
    return _literal(char), after


def _escaped(pattern: str, position: int) -> tuple[str, int]:
    """The one character that an escape stands for, and where it ends."""
    name = pattern[position + 1 : position + 2]
    if code := _CODE.match(pattern, position + 1):
        number = int(next(filter(None, code.groups())), 16)
        if number in _SURROGATES or number > _LAST:
            raise Unenforceable(f"'{code[0]}' in a pattern is not a Unicode character")
        return chr(number), code.end()
    if name in _CONTROLS:
        return _CONTROLS[name], position + 2
    if not name or name.isalnum():
        raise Unenforceable(f"'\\{name}' in a pattern is not supported")
    return name, position + 2


def _class(pattern: str, position: int, *, in_json: bool) -> tuple[str, int]:
    begin, negated = position, pattern.startswith("^", position + 1)
    position += 2 if negated else 1
    found: Ranges = []
    while not pattern.startswith("]", position):
        ranges, position = _members(pattern, position)
        found += ranges
    if not found:
        raise Unenforceable("an empty class in a pattern is not supported: a bracket in it is '\\]'")
    if in_json and not _meet(_others(found) if negated else found, _WRITTEN_AS_THEY_ARE):
        _refuse_escaped()
    if in_json:
        return "".join(
            char if char.isascii() else _coded(ord(char)) for char in pattern[begin : position + 1]
        ), position + 1
    return f"[{'^' * negated}{''.join(map(_range, _in_order(found)))}]", position + 1


def _in_order(ranges: Ranges) -> Ranges:
    """The same members of a class, without a digit behind one that xgrammar writes as a code: it would read on."""
    return sorted(
        _others(_others(ranges)), key=lambda ends: (ends[1] > ord("~") or ends[1] < ord(" "), not _digit(ends[0]))
    )


def _digit(code: int) -> bool:
    return chr(code) in hexdigits


def _range(ends: tuple[int, int]) -> str:
    return "-".join(_coded(end) for end in sorted(set(ends)))


def _members(pattern: str, position: int) -> tuple[Ranges, int]:
    """The next character, range or set of a class, and where it ends."""
    name = pattern[position + 1 : position + 2]
    if pattern.startswith("\\", position) and name in _SETS:
        return _SETS[name], position + 2
    low, position = _member(pattern, position)
    if not pattern.startswith("-", position) or pattern.startswith("-]", position):
        return [(low, low)], position
    high, position = _member(pattern, position + 1)
    if high < low:
        raise Unenforceable("a range in a pattern must begin with the lower character")
    return [(low, high)], position


def _member(pattern: str, position: int) -> tuple[int, int]:
    if position >= len(pattern):
        raise Unenforceable("a class in a pattern is not closed")
    if pattern[position] != "\\":
        return ord(pattern[position]), position + 1
    char, after = _escaped(pattern, position)
    return ord(char), after


def _others(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """What is in none of them."""
    left, found = 0, []
    for low, high in sorted(ranges):
        if left < low:
            found.append((left, low - 1))
        left = max(left, high + 1)
    return [*found, (left, _LAST)] if left <= _LAST else found


def _meet(ones: Iterable[tuple[int, int]], others: Ranges) -> bool:
    return any(low <= other_high and other_low <= high for low, high in ones for other_low, other_high in others)


_DIGITS: Final[Ranges] = [(0x30, 0x39)]
_WORDS: Final[Ranges] = [*_DIGITS, (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)]
_SPACES: Final[Ranges] = [(0x09, 0x0D), (0x20, 0x20)]
_NAMED: Final[dict[str, Ranges]] = {"d": _DIGITS, "w": _WORDS, "s": _SPACES}
_SETS: Final = _NAMED | {name.upper(): _others(ranges) for name, ranges in _NAMED.items()}


def _check_anchor(pattern: str, position: int, depth: int) -> None:
    char = pattern[position]
    outer = depth == 0
    if char == "^" and not (position == 0 or (outer and pattern[position - 1] == "|")):
        raise Unenforceable("'^' in a pattern is supported at its start only")
    if char == "$" and not (position == len(pattern) - 1 or (outer and pattern[position + 1] == "|")):
        raise Unenforceable("'$' in a pattern is supported at its end only")


def _check_literal(char: str, *, in_json: bool) -> None:
    if in_json and not _meet([(ord(char), ord(char))], _WRITTEN_AS_THEY_ARE):
        _refuse_escaped()


def _refuse_escaped() -> NoReturn:
    raise Unenforceable("a pattern cannot match quotes, backslashes or control characters, which JSON escapes")
