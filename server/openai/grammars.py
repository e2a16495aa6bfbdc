"""Limits on what constrains an answer: schemas, patterns and grammars compile inside the engine.

A short grammar can stand for a huge automaton (`{"maxItems": 10000000}`, `a{1,99999}`), so that
besides size, nesting and repetition counts are bounded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Final

from flexgate.server.openai.values import invalid, too_much

MAX_DEPTH: Final = 32
MAX_REPEAT: Final = 1024
_COUNTS: Final = frozenset(["minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties"])
# Possessive, so that it never goes back over what it has read: the pattern is the tenant's.
_QUANTIFIER: Final = re.compile(r"\{\s*+(\d*+)\s*+(?:,\s*+(\d*+)\s*+)?+\}")


def check_schema(schema: Any, param: str, *, longest: int) -> None:
    """Refuse a JSON schema that is too large, too deep or repeats too much."""
    if isinstance(schema, str):
        check_size(schema, param, longest=longest)
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError):
            invalid(f"'{param}' must be a JSON schema.", param)
    if not isinstance(schema, dict | bool):
        invalid(f"'{param}' must be a JSON schema.", param)
    check_size(json.dumps(schema, ensure_ascii=False), param, longest=longest)
    for depth, node in _nodes(schema, 1):
        if depth > MAX_DEPTH:
            too_much(f"'{param}' may be nested at most {MAX_DEPTH} deep.", param)
        _check_node(node, param)


def check_pattern(pattern: str, param: str, *, longest: int) -> None:
    """Refuse a regular expression or EBNF grammar that is too long or repeats too much."""
    check_size(pattern, param, longest=longest)
    for bounds in _QUANTIFIER.findall(pattern):
        if any(len(number) > 9 or int(number or 0) > MAX_REPEAT for number in bounds):
            too_much(f"'{param}' may repeat at most {MAX_REPEAT} times.", param)


def check_size(text: str, param: str, *, longest: int) -> None:
    """Refuse text longer than `longest` bytes."""
    if len(text.encode()) > longest:
        too_much(f"'{param}' may have at most {longest} bytes.", param)


def _check_node(node: dict[str, Any], param: str) -> None:
    for name in _COUNTS & node.keys():
        count = node[name]
        if isinstance(count, int | float) and count > MAX_REPEAT:
            too_much(f"'{name}' in '{param}' may be at most {MAX_REPEAT}.", param)
    pattern = node.get("pattern")
    if isinstance(pattern, str):
        check_pattern(pattern, param, longest=len(pattern.encode()))


def _nodes(value: Any, depth: int) -> Iterator[tuple[int, dict[str, Any]]]:
    stack = [(depth, value)]
    while stack:
        level, item = stack.pop()
        if isinstance(item, dict):
            yield level, item
            stack += [(level + 1, child) for child in item.values()]
        elif isinstance(item, list):
            stack += [(level + 1, child) for child in item]
