"""Limits on constraints, and refusals of what is not enforced.

A short grammar can stand for a huge automaton (`{"maxItems": 10000000}`, `a{1,99999}`), so that
besides size and nesting the sum of all repetition counts is bounded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final

from flexgate.server.engine.frontend.constraints import patterns
from flexgate.server.engine.frontend.constraints.errors import Unenforceable
from flexgate.server.engine.frontend.constraints.schemas import enforceable
from flexgate.server.http.body import NotJson, read_json_text
from flexgate.server.inference.request import fields
from flexgate.server.inference.request.values import boolean, invalid, keep_honoured, too_much

MAX_DEPTH: Final = 32
MAX_REPEATS: Final = 4096
"""Of a whole constraint: each costs the compiler time and every token a look."""
_COUNTS: Final = (("minItems", "maxItems"), ("minLength", "maxLength"), ("minProperties", "maxProperties"))
# Possessive, so that it never goes back over what it has read: the pattern is the tenant's.
_QUANTIFIER: Final = re.compile(r"\{\s*+(\d*+)\s*+(?:,\s*+(\d*+)\s*+)?+\}")
_UNLIKELY_DIGITS: Final = 9


def check_constraint(value: Any, *, longest: int) -> dict[str, Any]:
    """The honoured fields of `structured_outputs`, within limits; raises `Invalid`."""
    name = "structured_outputs"
    if not isinstance(value, dict):
        invalid(f"'{name}' must be an object.", name)
    kept = keep_honoured(value, fields.STRUCTURED_OUTPUTS, under=(name,))
    if len(kept) != 1:
        invalid(f"'{name}' must have exactly one of 'json', 'regex', 'choice', 'grammar' and 'json_object'.", name)
    for key, item in kept.items():
        param = f"{name}.{key}"
        if key == "json":
            kept[key] = check_enforced(item, param, longest=longest)
        elif key == "json_object":
            boolean(kept, key)
        elif key == "choice":
            _check_choices(item, param, longest)
        elif not isinstance(item, str):
            invalid(f"'{param}' must be a string.", param)
        elif key == "regex":
            check_regex(item, param, longest=longest)
        else:
            check_grammar(item, param, longest=longest)
            _check_notation(item, param)
    return kept


def _check_notation(grammar: str, param: str) -> None:
    """Refuse Lark's, which has other ways to repeat than those that are bounded."""
    from flexgate.server.engine.seam.openai import grammar_is_likely_lark

    if grammar_is_likely_lark(grammar):
        invalid(f"'{param}' must be EBNF: write rules as 'name ::= ...' and start with 'root'.", param)


def _check_choices(choices: Any, param: str, longest: int) -> None:
    if not isinstance(choices, list) or not all(isinstance(item, str) for item in choices):
        invalid(f"'{param}' must be a list of strings.", param)
    check_size("".join(choices), param, longest=longest)


def check_format(form: Mapping[str, Any], holder: Any, param: str, *, longest: int) -> None:
    """Refuse a response format that is unknown or not enforced; `holder` has its schema."""
    kind = form.get("type")
    if kind not in ("text", "json_object", "json_schema"):
        invalid(f"'{param}.type' must be 'text', 'json_object' or 'json_schema'.", f"{param}.type")
    if kind == "json_schema":
        schema = holder.get("schema") if isinstance(holder, Mapping) else None
        check_enforced(schema, param, longest=longest)


def check_schema(schema: Any, param: str, *, longest: int) -> Any:
    """Refuse a JSON schema that is too large, too deep or repeats too much; returns it, read where it is text."""
    if isinstance(schema, str):
        check_size(schema, param, longest=longest)
        try:
            schema = read_json_text(schema)
        except NotJson as error:
            invalid(f"'{param}' must be a JSON schema, or one as text: it {error}.", param)
    if not isinstance(schema, dict | bool):
        invalid(f"'{param}' must be a JSON schema.", param)
    nodes = _nodes(schema, param, longest=longest)
    check_size(as_text(schema, param), param, longest=longest)
    _check_repeats(sum(map(_repeats_of_node, nodes)), param)
    return schema


def as_text(schema: Any, param: str) -> str:
    """A schema as its size counts; refuses numbers that no JSON text can hold."""
    try:
        return json.dumps(schema, ensure_ascii=False, allow_nan=False)
    except ValueError:
        invalid(f"'{param}' has a number that is too large.", param)


def check_enforced(schema: Any, param: str, *, longest: int) -> Any:
    """Refuse also what the compiler does not enforce; returns the schema as it is compiled."""
    try:
        return enforceable(check_schema(schema, param, longest=longest))
    except Unenforceable as error:
        invalid(f"'{param}': {error}.", param)


def check_regex(pattern: str, param: str, *, longest: int) -> None:
    """Refuse a regular expression that is too long, repeats too much or is not enforced."""
    check_grammar(pattern, param, longest=longest)
    try:
        patterns.written_whole(pattern)
    except Unenforceable as error:
        invalid(f"'{param}': {error}.", param)


def check_grammar(grammar: str, param: str, *, longest: int) -> None:
    """Refuse an EBNF grammar that is too long or repeats too much."""
    check_size(grammar, param, longest=longest)
    _check_repeats(_repeats_of_text(grammar), param)


def check_size(text: str, param: str, *, longest: int) -> None:
    """Refuse text longer than `longest` bytes."""
    if len(text.encode()) > longest:
        too_much(_too_large(param, longest), param)


def _too_large(param: str, longest: int) -> str:
    return f"'{param}' may have at most {longest} bytes."


def _check_repeats(repeats: float, param: str) -> None:
    if repeats > MAX_REPEATS:
        counts = "the counts ({1,5}, 'maxItems', …)"
        too_much(f"'{param}' has too many repetitions: {counts} may add up to at most {MAX_REPEATS}.", param)


def _repeats_of_text(text: str) -> float:
    return sum(max(map(_number, bounds)) for bounds in _QUANTIFIER.findall(text))


def _number(digits: str) -> float:
    return float("inf") if len(digits) > _UNLIKELY_DIGITS else int(digits or 0)


def _repeats_of_node(node: dict[str, Any]) -> float:
    counts: float = sum(max(map(_count_of, (node.get(low), node.get(high)))) for low, high in _COUNTS)
    pattern, named = node.get("pattern"), node.get("patternProperties")
    texts = [pattern] if isinstance(pattern, str) else []
    texts += list(named) if isinstance(named, dict) else []
    return counts + sum(map(_repeats_of_text, texts))


def _count_of(value: Any) -> float:
    if type(value) not in (int, float):
        return 0
    return value if value <= MAX_REPEATS else float("inf")


def _nodes(schema: Any, param: str, *, longest: int) -> list[dict[str, Any]]:
    """The objects in a schema; refuses one that is too deep, or has more members than its bytes can hold."""
    stack, members, found = [(1, schema)], 0, []
    while stack:
        depth, item = stack.pop()
        if not isinstance(item, dict | list):
            continue
        if depth > MAX_DEPTH:
            too_much(f"'{param}' may be nested at most {MAX_DEPTH} levels deep.", param)
        members += len(item)
        if members > longest:
            too_much(_too_large(param, longest), param)
        if isinstance(item, dict):
            found.append(item)
        stack += [(depth + 1, child) for child in (item.values() if isinstance(item, dict) else item)]
    return found
