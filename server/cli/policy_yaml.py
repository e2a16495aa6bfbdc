"""Policy files as YAML, read strictly."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Final

from flexgate.experts.io.strict_yaml import dump_yaml, parse_yaml
from flexgate.policies.errors import ChangeRefused
from flexgate.policies.store.gitops import PolicyFile, parse_file

MAX_BYTES: Final = 16 * 1024 * 1024


def load(path: Path, *, stored: bool = True) -> PolicyFile:
    """A policy file, or standard input for `-`; raises `ChangeRefused` that says what is wrong where.

    `stored` says that it is compared with a store, as for `parse_file`.
    """
    with sys.stdin.buffer if str(path) == "-" else path.open("rb") as file:
        raw = file.read(MAX_BYTES + 1)
    if len(raw) > MAX_BYTES:
        raise ChangeRefused(f"{path} is larger than {MAX_BYTES} bytes")
    content = parse_yaml(raw, str(path), ChangeRefused)
    try:
        return parse_file(content, stored=stored)
    except (RecursionError, ValueError) as error:
        raise ChangeRefused(f"{path}: {error}") from None
    except ChangeRefused as error:
        raise ChangeRefused(f"{path}: {error}") from None


def dump(content: dict[str, Any]) -> str:
    """A policy as YAML."""
    return dump_yaml(content)
