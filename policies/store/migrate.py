"""Bring a database to this version's schema, with the migrations shipped in the package."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine

from flexgate.policies.errors import StoreFromNewerVersion
from flexgate.policies.store.engine import writing


def migrate(engine: Engine) -> None:
    """Create or upgrade the tables in one transaction; refuses a schema from a newer version."""
    with writing(engine) as connection:
        config = _config(connection)
        _refuse_newer(connection, ScriptDirectory.from_config(config))
        command.upgrade(config, "head")


def _config(connection: Connection) -> Config:
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
