"""The corpus of the benchmark `loop`: adversarial bodies for every door, made from the tables of fields."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

from flexgate.server.admin.operation import Operation
from flexgate.server.admin.operations import OPERATIONS
from flexgate.server.inference.request import fields
from flexgate.server.inference.request.values import Fate, Table
from speed.loop.values import FEW, FLAT_TOOLS, GENERIC, TEXTS, TYPED, Value, Values, fixed, inside, repeated

LARGEST = 1_000_000
"""Bytes, a little less than a body may have."""
SIZES = (LARGEST, 250_000, 60_000, 15_000, 4_000)
"""A body with a value of the right type is sent ever smaller until it is answered: what is accepted does the work."""
CONSTRAINING = frozenset({"response_format", "structured_outputs", "text", "tools", "tool_choice"})

Fields = Mapping[str, Any]
_CHAT: Fields = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
_TOOL = {"type": "function", "function": {"name": "f0"}}


@dataclass(frozen=True)
class Body:
    """One adversarial body; `value` makes the text of `field`, ``None`` stands for the whole query string.

    Attributes:
        seconds: how long its answer may take. Trying a constraint may take 5 s of a processor's time.
        unread: seconds in which its client reads nothing of the answer.
    """

    name: str
    method: Literal["GET", "POST"]
    path: str
    base: Fields
    field: str | None
    value: Value
    typed: bool
    admin: bool = False
    seconds: float = 10.0
    unread: float = 0.0

    def content(self, size: int) -> bytes:
        """The JSON text, or the query string, of about `size` bytes."""
        if self.field is None:
            return self.value(size).encode()
        rest = {name: value for name, value in self.base.items() if name != self.field}
        text = json.dumps(rest)
        field = f"{json.dumps(self.field)}:{_text(self.value, (size - len(text) - 40) // 100 * 100)}"
        return (text[:-1] + (", " if rest else "") + field + "}").encode()

    def sizes(self) -> tuple[int, ...]:
        """How large it is sent, in turn, until it is accepted."""
        return SIZES if self.typed else SIZES[:1]

    @property
    def unconstrained(self) -> bytes | None:
        """A request for as many tokens without the constraint, if there is one."""
        if self.admin or self.field not in CONSTRAINING:
            return None
        return json.dumps({name: value for name, value in self.base.items() if name not in CONSTRAINING}).encode()


@dataclass(frozen=True)
class Door:
    """An endpoint that takes a body, with a body that it accepts."""

    name: str
    path: str
    table: Table
    base: Fields
    generic: bool = True


DOORS = (
    Door("chat", "/v1/chat/completions", fields.CHAT, _CHAT),
    Door("chat, streamed", "/v1/chat/completions", fields.CHAT, {**_CHAT, "stream": True}, generic=False),
    Door("completions", "/v1/completions", fields.COMPLETION, {"prompt": "The", "max_tokens": 4}),
    Door("responses", "/v1/responses", fields.RESPONSES, {"input": "hi", "max_output_tokens": 4}),
    Door("tokenize", "/tokenize", fields.TOKENIZE_PROMPT, {"prompt": "The"}),
    Door("tokenize chat", "/tokenize", fields.TOKENIZE_CHAT, {"messages": _CHAT["messages"]}),
    Door("detokenize", "/detokenize", fields.DETOKENIZE, {"tokens": [7]}),
)


@lru_cache(64)
def _text(value: Value, size: int) -> str:
    """A value that many bodies share is made once."""
    return value(size)


def corpus() -> Iterator[Body]:
    """Every body."""
    for door in DOORS:
        yield from _of(door)
    yield from _long_answers()
    yield from _of_administration()
    yield from _queries()


def _of(door: Door) -> Iterator[Body]:
    for field, rule in door.table.items():
        values = GENERIC if rule.fate is Fate.HONOURED else FEW
        for kind, value in values.items() if door.generic else ():
            yield Body(f"{door.name}: {field}, {kind}", "POST", door.path, door.base, field, value, typed=False)
        if rule.fate is Fate.HONOURED:
            for kind, value in _typed(door, field).items():
                name = f"{door.name}: {field} = {kind}"
                seconds = 60.0 if field in CONSTRAINING else 10.0
                yield Body(name, "POST", door.path, _base(door, field), field, value, typed=True, seconds=seconds)
    for kind, value in {"many": _names, "one": lambda size: f'1, "{"u" * size}": 1'}.items():
        yield Body(f"{door.name}: unknown fields, {kind}", "POST", door.path, door.base, "unknown", value, typed=False)


_EVERY_SCORE: Fields = {"ignore_eos": True, "logprobs": 20}
_CHAT_SCORES: Fields = {**_CHAT, "ignore_eos": True, "logprobs": True, "top_logprobs": 20}
_PROMPT = [7 + number % 100 for number in range(1000)]
_LONG: Mapping[str, tuple[Door, Fields, str, Any]] = {
    "echo": (DOORS[2], {**_EVERY_SCORE, "echo": True, "max_tokens": 1, "n": 8}, "prompt", _PROMPT),
    "echo alone": (DOORS[2], {**_EVERY_SCORE, "echo": True, "max_tokens": 0}, "prompt", _PROMPT),
    "echo of 16": (DOORS[2], {**_EVERY_SCORE, "echo": True, "max_tokens": 1}, "prompt", [_PROMPT] * 16),
    "completion": (DOORS[2], {**_EVERY_SCORE, "prompt": "The", "n": 8}, "max_tokens", 250),
    "chosen ids": (
        DOORS[2],
        {"prompt": "The", "ignore_eos": True, "logprobs": 0, "max_tokens": 400},
        "logprob_token_ids",
        list(range(7, 27)),
    ),
    "chat": (DOORS[0], {**_CHAT_SCORES, "n": 8}, "max_tokens", 250),
    "responses": (
        DOORS[3],
        {"input": "hi", "ignore_eos": True, "top_logprobs": 20, "include": ["message.output_text.logprobs"]},
        "max_output_tokens",
        900,
    ),
}


def _long_answers() -> Iterator[Body]:
    """Short bodies whose answers are as long as they come, and as late."""
    for kind, (door, base, field, value) in _LONG.items():
        more: dict[str, tuple[Fields, float]] = {"": ({}, 0.0), ", streamed": ({"stream": True}, 0.0)}
        if "stream_interval" in door.table:
            more[", streamed seldom"] = ({"stream": True, "stream_interval": 100_000}, 0.0)
        if field.startswith("max"):
            more[", streamed and read late"] = ({"stream": True}, 6.0)
        for how, (added, unread) in more.items():
            name = f"{door.name}: {field} = long {kind}{how}"
            made = Body(name, "POST", door.path, {**base, **added}, field, fixed(value), typed=True)
            yield replace(made, seconds=60.0, unread=unread)


def _typed(door: Door, field: str) -> Values:
    return FLAT_TOOLS if field == "tools" and door.name == "responses" else TYPED.get(field, {})


def _base(door: Door, field: str) -> Fields:
    """With what makes the server use the field."""
    if field == "tools" and "tool_choice" in door.table:
        return {**door.base, "tool_choice": "required"}
    if field == "tool_choice":
        tool = {"type": "function", "name": "f0"} if door.name == "responses" else _TOOL
        return {**door.base, "tools": [tool]}
    return door.base


def _names(size: int) -> str:
    return "1, " + repeated('"unknown#":#', around="  ")(size).strip()


_PROJECT = "proj_bench"
_AGREEMENT = {"id": "all-bench", "experts": ["public"], "assignee": "everyone", "effect": "permit", "owner": "bench"}
_POLICY = {
    "tenants": repeated('{"id":"t#","name":"T"}'),
    "agreements": repeated(json.dumps({**_AGREEMENT, "id": "a#"})),
    "hidden_experts": repeated("7"),
}
_ADMIN_BASES: Mapping[str, Fields] = {
    "CreateProject": {"name": "P"},
    "ExpertPermissions": {"mode": "deny_list", "expert_ids": []},
    "CreateServiceAccount": {"name": "S"},
    "CreateAdminKey": {"name": "K", "role": "auditor"},
    "AgreementBody": _AGREEMENT,
    "Simulate": {"policy": {}},
    "RollBack": {"version": 10**9},
}
_ADMIN_TYPED: Mapping[str, Mapping[str, Values]] = {
    "CreateProject": {"name": TEXTS, "flexgate": {"groups": inside('{"groups":%}', repeated('"g#"'))}},
    "UpdateProject": {"name": TEXTS, "flexgate": {"purposes": inside('{"purposes":%}', repeated('"p#"'))}},
    "ExpertPermissions": {"expert_ids": {"many": repeated('"e#"'), "of another type": repeated("7")}},
    "CreateServiceAccount": {"name": TEXTS},
    "AgreementBody": {"experts": {"many": repeated('"e#"')}, "assignee": {"long": TEXTS["words"]}},
    "Simulate": {
        "policy": {name: inside(f'{{"{name}":%}}', value) for name, value in _POLICY.items()}
        | {f"{name} of another type": inside(f'{{"{name}":%}}', repeated("7")) for name in _POLICY}
    },
}


def _of_administration() -> Iterator[Body]:
    taking = [operation for operation in OPERATIONS if operation.method == "POST" and operation.body.model_fields]
    for operation in taking:
        yield from _of_operation(operation)
    for name, path, base in (
        ("add expert", "/v1/experts", {"package": "none"}),
        ("upload", "/v1/expert_uploads", {"files": {}}),
    ):
        for field in base:
            for kind, value in {**GENERIC, "sizes": repeated('"f#":1', around="{}")}.items():
                yield Body(f"{name}: {field}, {kind}", "POST", path, base, field, value, typed=False, admin=True)


def _of_operation(operation: Operation[Any, Any]) -> Iterator[Body]:
    path, model = _filled(operation.path), operation.body.__name__
    base = _ADMIN_BASES.get(model, {})
    typed = _ADMIN_TYPED.get(model, {})
    for field in operation.body.model_fields:
        for is_typed, values in ((False, FEW), (True, typed.get(field, {}))):
            for kind, value in values.items():
                name = f"{operation.method} {operation.path}: {field}{' =' if is_typed else ','} {kind}"
                yield Body(name, "POST", path, base, field, value, typed=is_typed, admin=True)


def _queries() -> Iterator[Body]:
    """Long query strings, and lists of what the bodies before have left."""
    long: Iterable[tuple[str, Value]] = (
        ("plain", lambda _size: ""),
        ("many", lambda size: "&".join(f"a{number}=1" for number in range(min(size, 50_000) // 9))),
        ("list", lambda size: "event_types[]=a&" * (min(size, 50_000) // 16)),
        ("long", lambda size: "after=" + "a" * min(size, 50_000)),
    )
    for path in sorted({_filled(operation.path) for operation in OPERATIONS if operation.method == "GET"}):
        for kind, value in long:
            yield Body(f"GET {path}, query {kind}", "GET", path, {}, None, value, typed=False, admin=True)
    for path in ("/v1/experts", "/v1/openapi.json", "/metrics", "/v1/experts/" + "e" * 40_000):
        yield Body(f"GET {path[:40]}", "GET", path, {}, None, lambda _size: "", typed=False, admin=True)


def _filled(path: str) -> str:
    """A path with the parameters that exist, where there is one that can be known."""
    known = {"project_id": _PROJECT, "rate_limit_id": "rl-none", "agreement_id": "all-bench"}
    parts = (part.strip("{}") if part.startswith("{") else None for part in path.split("/"))
    return "/".join(
        whole if name is None else known.get(name, "none") for name, whole in zip(parts, path.split("/"), strict=True)
    )
