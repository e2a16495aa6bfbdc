"""YAML read strictly: what YAML would guess, share or drop silently is refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

import yaml

_CORE: Final = (
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.nan|\.NaN|\.NAN", "-+."),
)
"""What plain words mean by YAML 1.2's core schema, by the characters that they may begin with."""


class _Strict(yaml.SafeLoader):
    """YAML 1.2's core schema, no key twice and no aliases: `NO` is Norway, and `1:30` no number of minutes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.constructor.ConstructorError(None, None, "aliases are not supported: write the value out", None)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a string", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def _int(self, node: Any) -> int:
        text = self.construct_scalar(node)
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))

    def _float(self, node: Any) -> float:
        return float(self.construct_scalar(node).replace(".inf", "inf").replace(".nan", "nan").lower())


class _Dumper(yaml.SafeDumper):
    """Quotes whatever YAML 1.1 or 1.2 would not read as the text that it is."""


def _resolvers(*tables: Mapping[str, Any]) -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    found: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    for table in tables:
        for first, resolvers in table.items():
            found.setdefault(first, []).extend(resolvers)
    return found


_core: Final = _resolvers(
    *(
        {"" if first == "\0" else first: [(f"tag:yaml.org,2002:{tag}", re.compile(rf"(?:{pattern})\Z"))]}
        for tag, pattern, firsts in _CORE
        for first in firsts
    )
)
_Strict.yaml_implicit_resolvers = _core
_Dumper.yaml_implicit_resolvers = _resolvers(yaml.SafeDumper.yaml_implicit_resolvers, _core)
_safe: Final = yaml.SafeLoader.yaml_constructors
_Strict.yaml_constructors = {
    tag: constructor
    for tag, constructor in _safe.items()
    if tag is None or tag.rpartition(":")[2] in ("null", "bool", "str", "seq", "map")
} | {"tag:yaml.org,2002:int": _Strict._int, "tag:yaml.org,2002:float": _Strict._float}


def parse_yaml(text: bytes, where: str, error_class: type[Exception]) -> Any:
    """The value of a YAML document; raises ``error_class`` with the place, in one line."""
    try:
        return yaml.load(text, Loader=_Strict)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise error_class(f"{where}: {' '.join(str(error).split())}") from None


def dump_yaml(content: Mapping[str, Any]) -> str:
    """A value as YAML, which ``parse_yaml`` reads back."""
    text: str = yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    return text
