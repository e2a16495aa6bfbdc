"""Bring a database to this version's schema, with the migrations shipped in the package."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine

from flexgate.policies.errors import ChangeRefused, StoreFromNewerVersion
from flexgate.policies.store.engine import reading, writing


def migrate(engine: Engine) -> None:
    """Create or upgrade the tables in one transaction; refuses a schema from a newer version."""
    with writing(engine) as connection:
        config = _config(connection)
        _refuse_newer(connection, ScriptDirectory.from_config(config))
        command.upgrade(config, "head")


def check_current(engine: Engine) -> None:
    """Raise a `StoreError` unless the schema is this version's."""
    scripts = ScriptDirectory.from_config(_config(None))
    with reading(engine) as connection:
        _refuse_newer(connection, scripts)
        heads = MigrationContext.configure(connection).get_current_heads()
    if set(heads) != set(scripts.get_heads()):
        raise ChangeRefused("the store has no tables of this version: start this version's server on it once")


def _config(connection: Connection | None) -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.attributes["connection"] = connection
    return config


def _refuse_newer(connection: Connection, scripts: ScriptDirectory) -> None:
    known = {script.revision for script in scripts.walk_revisions()}
    for revision in MigrationContext.configure(connection).get_current_heads():
        if revision not in known:
            raise StoreFromNewerVersion(
                f"the store's schema is at {revision!r}, which this version of flexgate does not "
                "know: start the newer version that migrated it"
            )
