"""Bring a database to this version's schema, with the migrations shipped in the package."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Final

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, Select, column, select, table

from flexgate.policies.errors import ChangeRefused, StoreFromNewerVersion
from flexgate.policies.store.database import reading, unhurried, writing

_AT: Final[Select[tuple[str]]] = select(column("version_num")).select_from(table("alembic_version"))


def migrate(engine: Engine) -> None:
    """Create or upgrade the tables in one transaction; refuses a schema from a newer version."""
    # urgent: a start on a full disk that has nothing to migrate
    with writing(engine, urgent=True) as connection, unhurried(connection):
        config = _config(connection)
        _refuse_unknown(MigrationContext.configure(connection).get_current_heads())
        command.upgrade(config, "head")


def refuse_newer(connection: Connection) -> None:
    """Raise `StoreFromNewerVersion` if a newer version has migrated the store, also while this one runs.

    Its data may have a meaning that this version does not know.
    """
    _refuse_unknown(connection.scalars(_AT))


def check_current(engine: Engine) -> None:
    """Raise a `StoreError` unless the schema is this version's."""
    scripts = ScriptDirectory.from_config(_config(None))
    with reading(engine) as connection:
        heads = MigrationContext.configure(connection).get_current_heads()
    _refuse_unknown(heads)
    if set(heads) != set(scripts.get_heads()):
        raise ChangeRefused(
            "the database schema is older than this version: start this version's server on it once, which migrates it"
        )


def _config(connection: Connection | None) -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.attributes["connection"] = connection
    return config


@cache
def _known() -> frozenset[str]:
    return frozenset(script.revision for script in ScriptDirectory.from_config(_config(None)).walk_revisions())


def _refuse_unknown(revisions: Iterable[str]) -> None:
    for revision in revisions:
        if revision not in _known():
            raise StoreFromNewerVersion(
                f"the store's schema is at {revision!r}, which this version of flexgate does not "
                "know: start the newer version that migrated it"
            )
