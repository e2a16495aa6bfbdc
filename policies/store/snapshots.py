"""Read a whole snapshot from one consistent state of the database."""

from __future__ import annotations

from sqlalchemy import Connection, select

from flexgate.policies.errors import SnapshotInvalid, StoreDamaged
from flexgate.policies.snapshot import Snapshot
from flexgate.policies.store import schema
from flexgate.policies.store.documents import read_all
from flexgate.policies.store.keys import key_from_row
from flexgate.policies.store.revisions import current_version
from flexgate.policies.tenants import Expert, ExpertSet, Tenant
from flexgate.policies.terms import Agreement


def read_snapshot(connection: Connection) -> Snapshot:
    """Everything the connection's transaction sees; raises `StoreDamaged`."""
    try:
        return Snapshot.build(
            policy_version=current_version(connection),
            experts=read_all(connection, Expert),
            tenants=read_all(connection, Tenant),
            agreements=read_all(connection, Agreement),
            sets=read_all(connection, ExpertSet),
            keys=map(key_from_row, connection.execute(select(schema.api_keys))),
        )
    except SnapshotInvalid as error:
        raise StoreDamaged(f"the stored policy does not fit together: {error}") from error
