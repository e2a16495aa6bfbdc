"""A store from any earlier version comes to the present with everything in it."""

from __future__ import annotations

import pytest
import sqlalchemy as sa
from alembic import command

from flexgate.policies.store import Store
from flexgate.policies.store.budgets import read_use
from flexgate.policies.store.database import writing
from flexgate.policies.store.decision_samples import read_samples
from flexgate.policies.store.history import diff
from flexgate.policies.store.migrate import _config

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
        for row in ROWS[:3]:
            connection.execute(sa.text(row))
        connection.execute(
            sa.text("""UPDATE tenants SET document = '{"id": "acme", "name": "Acme", "standing": []}'""")
        )
        connection.execute(
            sa.text(
                "INSERT INTO policy_changes (version, ordinal, kind, object_id, after) VALUES "
                """(1, 0, 'tenant', 'acme', '{"id": "acme", "name": "Acme", "standing": ["public"]}')"""
            )
        )
        connection.execute(
            sa.text("""INSERT INTO asked_questions VALUES ('s', 'acme', NULL, NULL, NULL, '["news"]', 3, 1.0)""")
        )
        connection.execute(sa.text("INSERT INTO token_use VALUES ('acme', 42)"))
    store.migrate()
    assert read_use(store.engine) == {"acme": 42}
    assert [(sample.ignore, times) for sample, times, _ in read_samples(store.engine)] == [(("news",), 3)]
    assert store.snapshot().tenants["acme"].default_experts == frozenset()
    [change] = diff(store, 0, 1)
    assert change.before is None
    assert change.after == {"id": "acme", "name": "Acme", "default_experts": ["public"]}
    store.close()


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
