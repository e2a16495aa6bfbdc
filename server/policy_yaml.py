"""Policy files as YAML, read strictly: what YAML would guess or drop silently is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Final

import yaml

from flexgate.policies.errors import ChangeRefused
from flexgate.policies.store.gitops import PolicyFile, parse_file

MAX_BYTES: Final = 16 * 1024 * 1024


class _Strict(yaml.SafeLoader):
    """No key twice, no aliases, and `NO` is Norway rather than false."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.constructor.ConstructorError(None, None, "aliases are not used in policy files", None)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for place, (key, _) in enumerate(node.value):
            if key.value in keys[:place]:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is there twice", key.start_mark)
        return super().construct_mapping(node, deep)


_Strict.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":bool") or first in "tTfF"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def load(path: Path) -> PolicyFile:
    """A policy file, or standard input for `-`; raises `ChangeRefused` that says what is wrong where."""
    with sys.stdin.buffer if str(path) == "-" else path.open("rb") as file:
        raw = file.read(MAX_BYTES + 1)
    if len(raw) > MAX_BYTES:
        raise ChangeRefused(f"{path} is larger than {MAX_BYTES} bytes")
    try:
        return parse_file(yaml.load(raw, Loader=_Strict))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ChangeRefused(f"{path}: {error}") from None
    except ChangeRefused as error:
        raise ChangeRefused(f"{path}: {error}") from None


def dump(content: dict[str, Any]) -> str:
    """A policy as YAML."""
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120)
