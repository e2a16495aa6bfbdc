"""Adversarial JSON values, as text: each is a function of about how many bytes it may take.

`GENERIC` values fit any field and are of the wrong type for most. `TYPED` ones have a type that the field takes, so
that they get past the first checks and something is made of them.
"""

import json
from collections.abc import Callable
from typing import Any

Value = Callable[[int], str]
Values = dict[str, Value]


def repeated(item: str, *, around: str = "[]") -> Value:
    """As many of `item` as fit; ``#`` in it is the position."""

    before, *between = item.split("#")

    def make(size: int) -> str:
        made, left = [], size
        while left > 0 or not made:
            made.append(before + "".join(f"{len(made)}{part}" for part in between))
            left -= len(made[-1]) + 1
        return around[0] + ",".join(made[: max(1, len(made) - 1)]) + around[1]

    return make


def filled(item: str, text: str = "ferry ") -> Value:
    """`item` with ``%`` replaced by as much of `text` as fits."""
    return lambda size: item.replace("%", text * max(1, (size - len(item)) // len(text)))


def nested(opened: str, closed: str, middle: str, most: int = 1 << 30) -> Value:
    """`middle` inside as many pairs as fit, or `most`."""

    def make(size: int) -> str:
        depth = max(1, min(most, size // (len(opened) + len(closed))))
        return opened * depth + middle + closed * depth

    return make


def inside(item: str, value: Value) -> Value:
    """`item` with ``%`` replaced by a value."""
    return lambda size: item.replace("%", value(size - len(item)))


def fixed(value: Any) -> Value:
    """One value, whatever the size."""
    text = json.dumps(value)
    return lambda _size: text


def quoted(value: Value, share: int = 1) -> Value:
    """What a value makes as a JSON string; escaped quotes need a larger `share`."""
    return lambda size: json.dumps(value(size // share))


GENERIC: Values = {
    "string": filled('"%"'),
    "integers": repeated("7"),
    "strings": repeated('"s#"'),
    "objects": repeated('{"a":#}'),
    "wide": repeated('"k#":#', around="{}"),
    "deep": nested("[", "]", "1", 900),
    "digits": lambda size: "9" * min(size, 4000),
}
FEW: Values = {name: GENERIC[name] for name in ("string", "wide", "deep")}

TEXTS: Values = {
    "words": filled('"%"'),
    "one word": filled('"%"', "a"),
    "unbroken": filled('"%"', "aB3$"),
    "blanks": filled('"%"', " "),
    "lines": filled('"%"', "\\n"),
    "escapes": filled('"%"', "\\u00e9"),
    "emoji": lambda size: '"' + "🦊" * max(1, size // 4) + '"',
    "control": filled('"%"', "<|end|>"),
}

_OBJECT = '{"type":"object","properties":{%},"required":["p0"]}'


def _properties(schema: str) -> Value:
    properties = repeated(f'"p#":{schema}', around="  ")
    return lambda size: _OBJECT.replace("%", properties(size - len(_OBJECT)).strip())


def _alternatives(size: int) -> str:
    """`(a?|a?b|…){1024}`: many states, each with many ways on."""
    parts = "|".join("a?" + "b" * (number % 2) for number in range(max(1, (size - 8) // 4)))
    return f"({parts}){{1024}}"


PATTERNS: Values = {
    "repeats": filled('"%"', "a{1,1000}"),
    "any repeats": filled('"%"', ".{1,1000}"),
    "five any repeats": fixed(".{1,1000}" * 5),
    "nested repeats": quoted(nested("(", "{1,50})", "a", 12)),
    "alternatives": lambda size: json.dumps(_alternatives(size)),
    "classes": filled('"%"', "[\\u0001-\\uffff]{1,100}"),
    "optional": filled('"%"', "(ab?)?"),
    "stars": quoted(nested("(", "*)*", "a", 300)),
    "groups": quoted(nested("(", ")", "a")),
    "words": lambda size: json.dumps("|".join(f"word{number}" for number in range(max(1, size // 16)))),
    "e-mail": fixed("[a-zA-Z0-9._%+-]{1,64}@[a-zA-Z0-9.-]{1,255}"),
}

_TAGGED = '{"type":"object","properties":{"k":%},"required":["k"]}'


def _listed(around: str, each: int) -> Value:
    """Alternatives with `each` values in every one, all different."""

    def make(size: int) -> str:
        many = max(1, size // (len(around) + 14 + 8 * each))
        lists = ([each * number + place for place in range(each)] for number in range(many))
        return '{"oneOf":[' + ",".join(around.replace("%", json.dumps({"enum": values})) for values in lists) + "]}"

    return make


def _referring(size: int) -> str:
    """Half of the bytes are values of two definitions, half alternatives that refer to them."""
    values = list(range(max(2, size // 14)))
    definitions = {"a": {"enum": values[::2]}, "b": {"enum": values[1::2]}}
    either = repeated('"p#":{"oneOf":[{"$ref":"#/$defs/a"},{"$ref":"#/$defs/b"}]}', around="{}")
    return f'{{"$defs":{json.dumps(definitions)},"type":"object","properties":{either(size // 2)}}}'


ONE_OF: Values = {
    "tags": _listed(_TAGGED, 1),
    "many tags": _listed(_TAGGED, 100),
    "values": _listed("%", 1),
    "many values": _listed("%", 100),
    "same tags": lambda size: '{"oneOf":' + repeated(_TAGGED.replace("%", '{"const":1}'))(size) + "}",
    "types": lambda size: '{"oneOf":' + repeated('{"type":"string","maxLength":#}')(size) + "}",
    "many properties": lambda size: (
        '{"oneOf":'
        + repeated('{"type":"object","properties":{"a":{"const":1},"b":{"const":#}},"required":["b","a"]}')(size)
        + "}"
    ),
    "references": _referring,
}

SCHEMAS: Values = {
    "properties": _properties('{"type":"string"}'),
    "optional properties": lambda size: _properties('{"type":"integer"}')(size).replace('"required":["p0"]', '"a":1'),
    "enum": lambda size: '{"enum":' + repeated('"value#"')(size - 10) + "}",
    "long enum": filled('{"enum":["%"]}'),
    "any of": lambda size: (
        '{"anyOf":' + repeated('{"type":"object","properties":{"a#":{"type":"string"}}}')(size) + "}"
    ),
    "any of same": lambda size: '{"anyOf":' + repeated('{"type":"string","maxLength":#}')(size) + "}",
    **{f"one of {name}": value for name, value in ONE_OF.items()},
    "all of": lambda size: '{"allOf":' + repeated('{"type":"object"}')(size) + "}",
    "deep arrays": nested('{"type":"array","items":', "}", '{"type":"string"}'),
    "deep arrays allowed": nested('{"type":"array","items":', "}", '{"type":"string"}', 14),
    "bounded arrays": nested('{"type":"array","minItems":2,"maxItems":1000,"items":', "}", '{"type":"string"}', 4),
    "deep objects": nested('{"type":"object","required":["a"],"properties":{"a":', "}}", '{"type":"string"}', 14),
    "definitions": lambda size: (
        '{"$ref":"#/$defs/d0","$defs":' + repeated('"d#":{"type":"string"}', around="{}")(size - 40) + "}"
    ),
    "recursion": fixed({"$ref": "#/$defs/a", "$defs": {"a": {"type": "array", "items": {"$ref": "#/$defs/a"}}}}),
    "lengths": _properties('{"type":"string","minLength":1,"maxLength":1000}'),
    "patterns": _properties('{"type":"string","pattern":"^a{1,900}$"}'),
    "formats": _properties('{"type":"string","format":"uri"}'),
    "numbers": _properties('{"type":"integer","minimum":-999999999,"maximum":999999999}'),
    "required": lambda size: '{"type":"object","required":' + repeated('"r#"')(size - 40) + "}",
    "unknown": repeated('"x#":#', around="{}"),
    **{f"pattern, {name}": inside('{"type":"string","pattern":%}', value) for name, value in PATTERNS.items()},
}

GRAMMARS: Values = {
    "rules": lambda size: json.dumps(
        "root ::= r0\n" + "\n".join(f'r{n} ::= "a" r{n + 1} | "b"' for n in range(max(1, size // 36)))
    ).replace(f"r{max(1, size // 36)} |", "root |"),
    "choices": lambda size: json.dumps("root ::= " + " | ".join(f'"c{n}"' for n in range(max(1, size // 16)))),
    "repeats": lambda size: json.dumps("root ::= " + "[a-z]{1,1000} " * max(1, size // 14)),
    "nested": lambda size: json.dumps("root ::= " + "(" * min(200, size // 8) + '"a"' + ")*" * min(200, size // 8)),
    "ambiguous": fixed('root ::= ("a"? | "a"? "b")* root?'),
}

_CALL = '{"id":"c#","type":"function","function":{"name":"f#","arguments":"{}"}}'
_TOOL = '{"type":"function","function":{"name":"f#"}}'
_FLAT_TOOL = '{"type":"function","name":"f#"}'
_PARAMETERS = '"parameters":{"type":"object","properties":{"a":{"type":"string"}}}'
_LONG_NAME = "n" * 56 + "#"
_USER = '{"role":"user","content":"hi"}'

MESSAGES: Values = {
    "many": repeated(_USER),
    "empty": repeated('{"role":"user","content":""}'),
    "parts": inside('[{"role":"user","content":%}]', repeated('{"type":"text","text":"hi"}')),
    "calls": inside('[{"role":"user","content":"a"},{"role":"assistant","tool_calls":%}]', repeated(_CALL)),
    "results": repeated('{"role":"tool","tool_call_id":"c#","content":"42"}'),
    "turns": repeated('{"role":"user","content":"a"},{"role":"assistant","content":"b"}'),
    "names": inside('[{"role":"user","content":"hi","name":%}]', TEXTS["words"]),
    "arguments": inside(
        '[{"role":"user","content":"a"},{"role":"assistant","tool_calls":[{"id":"c","type":"function",'
        '"function":{"name":"f","arguments":%}}]}]',
        quoted(repeated('"k#":#', around="{}"), 2),
    ),
    **{f"text, {name}": inside('[{"role":"user","content":%}]', value) for name, value in TEXTS.items()},
}
ITEMS: Values = {
    "messages": repeated('{"type":"message","role":"user","content":"hi"}'),
    "untyped": repeated(_USER),
    "parts": inside('[{"role":"user","content":%}]', repeated('{"type":"input_text","text":"hi"}')),
    "answers": repeated(
        '{"type":"message","role":"assistant","id":"m#","status":"completed",'
        '"content":[{"type":"output_text","text":"hi","annotations":[]}]}'
    ),
    "calls": repeated('{"type":"function_call","call_id":"c#","name":"f","arguments":"{}"}'),
    "outputs": repeated('{"type":"function_call_output","call_id":"c#","output":"42"}'),
    "pairs": repeated(
        '{"type":"function_call","call_id":"c#","name":"f","arguments":"{}"},'
        '{"type":"function_call_output","call_id":"c#","output":"42"}'
    ),
    **{f"text, {name}": value for name, value in TEXTS.items()},
}


_OBJECT_OF = '"parameters":{"type":"object","properties":{"a":%}}'


def _many_with(tool: str, schema: Value, many: int) -> Value:
    """`many` tools that share the bytes."""

    def make(size: int) -> str:
        one = tool.replace("%", schema(size // many - len(tool)))
        return "[" + ",".join(one.replace("f#", f"f{number}") for number in range(many)) + "]"

    return make


def _tools(item: str, around: str) -> Values:
    """`item` is a tool, `around` one with ``%`` for what else it says."""
    return {
        "many": repeated(item),
        "long names": repeated(item.replace("f#", _LONG_NAME)),
        "128": lambda _size: "[" + ",".join(item.replace("#", str(number)) for number in range(128)) + "]",
        "with parameters": repeated(around.replace("%", _PARAMETERS)),
        "description": inside("[" + around + "]", filled('"description":"%"')),
        **{
            f"schema, {name}": inside("[" + around + "]", inside('"parameters":%', SCHEMAS[name]))
            for name in ("properties", "optional properties", "any of", "deep objects", "patterns", "lengths")
        },
        **{
            f"{many} with one of {name}": _many_with(around, inside(_OBJECT_OF, value), many)
            for name, value in ONE_OF.items()
            for many in (1, 62)
        },
    }


TOOLS = _tools(_TOOL, '{"type":"function","function":{"name":"f#",%}}')
FLAT_TOOLS = _tools(_FLAT_TOOL, '{"type":"function","name":"f#",%}')
FORMATS: Values = {
    name: inside('{"type":"json_schema","json_schema":{"name":"n","schema":%}}', value)
    for name, value in SCHEMAS.items()
}
FLAT_FORMATS: Values = {
    name: inside('{"format":{"type":"json_schema","name":"n","schema":%}}', SCHEMAS[name])
    for name in ("properties", "enum", "any of", "deep arrays", "lengths", "pattern, five any repeats")
}
CONSTRAINTS: Values = {
    **{f"regex, {name}": inside('{"regex":%}', value) for name, value in PATTERNS.items()},
    **{f"grammar, {name}": inside('{"grammar":%}', value) for name, value in GRAMMARS.items()},
    **{f"json, {name}": inside('{"json":%}', SCHEMAS[name]) for name in ("properties", "any of", "recursion")},
    **{f"json, one of {name}": inside('{"json":%}', value) for name, value in ONE_OF.items()},
    "json as text": inside('{"json":%}', quoted(SCHEMAS["properties"], 2)),
    "choice": inside('{"choice":%}', repeated('"choice #"')),
    "choice alike": inside('{"choice":%}', repeated('"' + "a" * 40 + '#"')),
    "json_object": fixed({"json_object": True}),
    "unknown": repeated('"x#":#', around="{}"),
}
PROMPTS: Values = {
    **{f"text, {name}": value for name, value in TEXTS.items()},
    "ids": repeated("7"),
    "large ids": repeated("2147483647"),
    "floats": repeated("1.0"),
    "16 texts": lambda size: json.dumps(["ferry " * max(1, size // 100)] * 16),
    "texts": repeated('"a"'),
    "lists of ids": repeated("[7]"),
    "16 lists of ids": lambda size: json.dumps([[7] * max(1, size // 50)] * 16),
}
EXPERTS: Values = {
    "only": inside('{"experts":{"only":%}}', repeated('"expert-#"')),
    "ignore": inside('{"experts":{"ignore":%}}', repeated('"expert-#"')),
    "256 long names": fixed({"experts": {"only": ["n" * 76 + str(100 + number) for number in range(256)]}}),
    "purpose": inside('{"purpose":%}', TEXTS["words"]),
    "unknown": repeated('"x#":#', around="{}"),
}

TYPED: dict[str, Values] = {
    "messages": MESSAGES,
    "input": ITEMS,
    "instructions": TEXTS,
    "prompt": PROMPTS,
    "tools": TOOLS,
    "response_format": FORMATS,
    "text": FLAT_FORMATS,
    "structured_outputs": CONSTRAINTS,
    "flexgate": EXPERTS,
    "stop": {
        "4 long": lambda size: json.dumps(["s" * max(1, size // 4 - 4)] * 4),
        "many": repeated('"s#"'),
        "string": TEXTS["words"],
    },
    "bad_words": {
        "many": repeated('"w#"'),
        "128": lambda size: json.dumps([f"w{number} " * max(1, size // 1000) for number in range(128)]),
        "one": inside("[%]", TEXTS["words"]),
    },
    "logit_bias": {"many": repeated('"#":1', around="{}"), "1024": fixed({str(n): 1 for n in range(1024)})},
    "allowed_token_ids": {"many": repeated("#"), "1024": fixed(list(range(1024)))},
    "stop_token_ids": {"many": repeated("#"), "100": fixed(list(range(100)))},
    "logprob_token_ids": {"many": repeated("#"), "20": fixed(list(range(20)))},
    "tool_choice": {
        "named": inside('{"type":"function","function":{"name":%}}', TEXTS["words"]),
        "wide": inside('{"type":"function","function":{"name":"f0"},"x":%}', GENERIC["wide"]),
    },
    "stream_options": {"unknown": repeated('"x#":true', around="{}")},
    "include": {"many": repeated('"message.output_text.logprobs"')},
    "reasoning": {"effort": inside('{"effort":%}', TEXTS["words"])},
    "tokens": {"ids": repeated("7"), "large": repeated("2147483647"), "floats": repeated("7.0")},
    "model": {"long": TEXTS["words"]},
    "cache_salt": {"long": TEXTS["words"], "emoji": TEXTS["emoji"]},
}
