"""What commands on the policy database share: opening it, the actor of a change, and failing.

They change the database itself. Every running server enforces a change with its next poll, by
default within a quarter of a second.
"""

from __future__ import annotations

import getpass
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from sqlalchemy.engine import make_url

from flexgate.experts.errors import ExpertsError, UsageInvalid
from flexgate.policies.errors import PolicyError, StoreUnavailable
from flexgate.policies.store.migrate import check_current
from flexgate.policies.store.store import Store
from flexgate.server.lifecycle.store_settings import SettingsError, load_store_settings

FAILED: Final = 1
DIFFERENT: Final = 3

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


@contextmanager
def opened(demo: bool | None, state_dir: Path | None, database_url: str | None) -> Iterator[Store]:
    """Open the store and close it at the end; an error is one sentence and exit status 1."""
    with failing():
        url = load_store_settings(demo=demo, state_dir=state_dir, database_url=database_url).database()
        _require_file(url)
        store = Store.open(url)
        try:
            check_current(store.engine)
            yield store
        finally:
            store.close()


@contextmanager
def failing() -> Iterator[None]:
    """Turn an expected error into one sentence and exit status 1, or 2 for wrong usage."""
    try:
        yield
    except (PolicyError, SettingsError, ExpertsError, OSError, UnicodeDecodeError) as error:
        typer.secho(f"flexgate: {' '.join(str(error).split())}", err=True, fg=typer.colors.RED)
        raise typer.Exit(2 if isinstance(error, UsageInvalid) else FAILED) from None


def actor() -> str:
    """The actor of a change, as the audit log shows it."""
    try:
        return f"cli:{getpass.getuser()}"
    except (KeyError, OSError):
        return f"cli:uid-{os.getuid()}"


def print_json(value: Any) -> None:
    """Print JSON for programs."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _require_file(url: str) -> None:
    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite" and not Path(parsed.database or "").is_file():
        raise StoreUnavailable(
            f"there is no policy database at '{parsed.database}': start the server once, which creates it, "
            "or name another with --state-dir or --database-url"
        )
