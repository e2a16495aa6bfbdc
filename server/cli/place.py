"""Which place a command acts on, when its options and the environment name several."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any, Final

from flexgate.experts.errors import UsageInvalid

SERVER: Final = frozenset(["url", "key"])
DATABASE: Final = frozenset(["demo", "state_dir", "database_url"])


def chosen_place(options: Mapping[str, Any], typed: Set[str]) -> dict[str, Any]:
    """Return the options of one place: a server, or a database.

    A typed server outweighs a database that only the environment names, and the reverse. `FLEXGATE_DATABASE_URL` beside
    `FLEXGATE_STATE_DIR` is how servers are started, and names one database: the URL's. `FLEXGATE_DEMO` beside
    `FLEXGATE_STATE_DIR`, or the two options, name the demo's own database in that directory.

    Args:
        options: values by name, typed or from the environment.
        typed: names of those that were typed.

    Raises:
        UsageInvalid: two places, or a typed option that would be ignored; names both.
    """
    found = dict(options)
    for kind, other in ((SERVER, DATABASE), (DATABASE, SERVER)):
        if typed & kind and not typed & other:
            found |= dict.fromkeys(other)
    databases = sorted(name for name in DATABASE if found[name])
    if found["url"] and databases:
        raise _two("url", databases[0], typed, "places to act on")
    if "key" in typed and not found["url"]:
        raise UsageInvalid("--key is for a running server, and none is named: give --url, or leave --key out")
    if found["demo"] and found["state_dir"] and typed & {"demo", "state_dir"} == {"state_dir"}:
        raise _two("demo", "state_dir", typed, "databases")
    if found["database_url"]:
        for name in databases:
            if name == "demo" or (name == "state_dir" and name in typed):
                raise _two("database_url", name, typed, "databases")
    return found


def _two(one: str, other: str, typed: Set[str], what: str) -> UsageInvalid:
    both = " and ".join(f"--{n.replace('_', '-')}" if n in typed else f"FLEXGATE_{n.upper()}" for n in (one, other))
    return UsageInvalid(f"{both} name two {what}: leave one of them out, or unset the variable")
