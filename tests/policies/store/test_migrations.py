"""A store from any earlier version comes to the present with everything in it."""

from __future__ import annotations

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from flexgate.policies.store import Store
from flexgate.policies.store.budgets import read_use
from flexgate.policies.store.database import reading, writing
from flexgate.policies.store.decision_samples import read_samples
from flexgate.policies.store.history import diff
from flexgate.policies.store.migrate import _config
from flexgate.policies.store.schema import metadata, policy_changes

ROWS = [
    'INSERT INTO experts VALUES (\'public\', 1, \'{"id": "public", "owner": "commons"}\')',
    'INSERT INTO tenants VALUES (\'acme\', 1, \'{"id": "acme", "name": "Acme"}\')',
    "INSERT INTO policy_revisions VALUES (1, 1.0, 'admin', '')",
    "INSERT INTO api_keys (id, sha256, prefix, role, tenant_id, created) "
    "VALUES ('key_1', :digest, 'sk-1', 'tenant', 'acme', 1.0)",
]


@pytest.mark.parametrize("earlier", ["0001", "0002"])
def test_earlier_store_keeps_its_tenants_and_keys(url, earlier):
    store = Store.open(url)
    with writing(store.engine) as connection:
        command.upgrade(_config(connection), earlier)
        for row in ROWS:
            connection.execute(sa.text(row), {"digest": b"1" * 32} if ":digest" in row else {})
    store.migrate()
    snapshot = store.snapshot()
    assert snapshot.policy_version == 1
    assert snapshot.tenants["acme"].name == "Acme"
    assert snapshot.keys[b"1" * 32].tenant_id == "acme"
    assert snapshot.keys[b"1" * 32].name == ""
    store.close()


def test_what_an_earlier_store_calls_otherwise_keeps_its_meaning(url):
    store = Store.open(url)
    with writing(store.engine) as connection:
        command.upgrade(_config(connection), "0008")
        _fill(connection)
    store.migrate()
    assert read_use(store.engine).used == {"acme": 42}
    assert [(sample.ignore, times) for sample, times, _ in read_samples(store.engine)] == [(("news",), 3)]
    assert store.snapshot().tenants["acme"].default_experts == frozenset()
    [change] = diff(store, 0, 1)
    assert change.before is None
    assert change.after == {"id": "acme", "name": "Acme", "default_experts": ["public"]}
    store.close()


def test_every_migration_can_be_undone(url):
    store = Store.open(url)
    with writing(store.engine) as connection:
        config = _config(connection)
        revisions = [script.revision for script in ScriptDirectory.from_config(config).walk_revisions()][::-1]
        schemas = [_schema(connection)]
        for revision in revisions:
            command.upgrade(config, revision)
            schemas.append(_schema(connection))
        for revision, before in zip(["base", *revisions[:-1]][::-1], schemas[:-1][::-1], strict=True):
            command.downgrade(config, revision)
            assert _schema(connection) == before, revision
    store.close()


def test_what_was_stored_is_there_again_after_a_migration_is_undone(url):
    store = Store.open(url)
    with writing(store.engine) as connection:
        config = _config(connection)
        command.upgrade(config, "0008")
        _fill(connection)
        before = _rows(connection)
        command.upgrade(config, "head")
        assert _rows(connection) != before
        command.downgrade(config, "0008")
        assert _rows(connection) == before
    store.close()


def test_a_migrated_schema_is_the_one_that_is_declared(url):
    store = Store.open(url)
    store.migrate()
    with reading(store.engine) as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
        found = _schema(connection)
    assert {name: keys["primary key"]["name"] for name, keys in found.items()} == {
        name: f"pk_{name}" for name in metadata.tables
    }
    store.close()


def test_a_long_history_is_migrated_in_parts(url):
    store, reads = Store.open(url), []
    with writing(store.engine) as connection:
        command.upgrade(_config(connection), "0008")
        connection.execute(sa.text(ROWS[2]))
        change = {"version": 1, "kind": "tenant", "object_id": "acme", "after": {"id": "acme", "standing": []}}
        connection.execute(sa.insert(policy_changes), [{**change, "ordinal": number} for number in range(1100)])
    sa.event.listen(store.engine, "before_cursor_execute", lambda _c, _cursor, sql, *_: reads.append(sql))
    store.migrate()
    assert sum(sql.startswith("SELECT") and "FROM policy_changes" in sql for sql in reads) == 4
    with reading(store.engine) as connection:
        kept = connection.scalars(sa.select(policy_changes.c.after)).all()
    assert kept == [{"id": "acme", "default_experts": []}] * 1100
    store.close()


def _schema(connection):
    """Tables with their columns and constraints, by name."""
    inspector = sa.inspect(connection)
    return {
        name: {
            "columns": {c["name"]: (str(c["type"]), c["nullable"], c["default"]) for c in inspector.get_columns(name)},
            "primary key": inspector.get_pk_constraint(name),
            "foreign keys": inspector.get_foreign_keys(name),
            "unique": sorted(inspector.get_unique_constraints(name), key=lambda found: found["name"]),
            "indexes": sorted(inspector.get_indexes(name), key=lambda found: found["name"]),
        }
        for name in inspector.get_table_names()
        if name != "alembic_version"
    }


def _fill(connection):
    """Rows that later migrations change."""
    for row in (
        *ROWS[:3],
        """UPDATE tenants SET document = '{"id": "acme", "name": "Acme", "standing": []}'""",
        "INSERT INTO policy_changes (version, ordinal, kind, object_id, after) VALUES "
        """(1, 0, 'tenant', 'acme', '{"id": "acme", "name": "Acme", "standing": ["public"]}')""",
        """INSERT INTO asked_questions VALUES ('s', 'acme', NULL, NULL, NULL, '["news"]', 3, 1.0)""",
        "INSERT INTO token_use VALUES ('acme', 42)",
    ):
        connection.execute(sa.text(row))


def _rows(connection):
    """What the tables of `_fill` hold, by column; JSON as it is read."""
    found = sa.MetaData()
    found.reflect(connection)
    return {
        name: [dict(row) for row in connection.execute(sa.select(table)).mappings()]
        for name, table in found.tables.items()
        if name != "alembic_version"
    }


def test_interrupted_migration_leaves_the_old_schema(url, monkeypatch):
    store = Store.open(url)

    upgrade = command.upgrade

    def fail(*arguments: object) -> None:
        upgrade(*arguments)
        raise RuntimeError("power cut")

    monkeypatch.setattr("flexgate.policies.store.migrate.command.upgrade", fail)
    with pytest.raises(RuntimeError):
        store.migrate()
    monkeypatch.undo()
    assert sa.inspect(store.engine).get_table_names() == []
    store.migrate()
    assert store.version() == 0
    store.close()
