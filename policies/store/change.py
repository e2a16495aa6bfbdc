"""One change of the policy, in one transaction: documents put or removed, keys made or revoked."""

from __future__ import annotations

import secrets
from dataclasses import asdict, replace
from typing import Any

from sqlalchemy import ColumnElement, Connection, delete, func, insert, select, update

from flexgate.policies.agreements import Agreement
from flexgate.policies.audit import Event
from flexgate.policies.documents import ExpertSet, KeyRecord, Role, Tenant
from flexgate.policies.errors import ChangeRefused
from flexgate.policies.ids import OwnerId, TenantId
from flexgate.policies.snapshot import Snapshot
from flexgate.policies.store import audit, checks, schema
from flexgate.policies.store.change_notifications import notify
from flexgate.policies.store.documents import KINDS, D, PolicyDocument, read_all, read_one, to_json
from flexgate.policies.store.keys import MintedKey, digest, key_from_row, new_secret, read_keys
from flexgate.policies.store.revisions import (
    ObjectChange,
    Revision,
    agreement_versions,
    append,
    current_version,
)
from flexgate.policies.store.snapshots import read_snapshot
from flexgate.policies.store.weights_log import Action, append_weights, newest_epoch


class Change:
    """A change of the policy, from `Store.change`. Every method raises `ChangeRefused` for invalid input."""

    def __init__(self, connection: Connection, *, actor: str, note: str, at: float) -> None:
        self._connection = connection
        self._revision = Revision(current_version(connection) + 1, at, actor, note)
        self._changes: list[ObjectChange] = []
        self._weights: list[Event] = []

    @property
    def policy_version(self) -> int:
        """The version that holds once this change is committed."""
        return self._revision.version if self._changes else self._revision.version - 1

    @property
    def at(self) -> float:
        """When it is made, in Unix seconds."""
        return self._revision.at

    @property
    def changes(self) -> list[ObjectChange]:
        """What was changed so far, in order."""
        return list(self._changes)

    def get(self, kind: type[D], id_: str) -> D | None:
        """The document as this transaction sees it."""
        return read_one(self._connection, kind, id_)

    def all(self, kind: type[D]) -> list[D]:
        """Every document of a kind as this transaction sees them."""
        return read_all(self._connection, kind)

    def next_agreement_version(self, id_: str) -> int:
        """One more than the highest version ever stored under this id."""
        versions = agreement_versions(self._connection, id_)
        return 1 + max((agreement.version for agreement in versions), default=0)

    def agreements_by_assignee(self, owner: str) -> dict[str, int]:
        """How many agreements of an owner there are with each assignee."""
        document = schema.agreements.c.document
        assignee = document["assignee"].as_string()
        query = select(assignee, func.count()).where(document["owner"].as_string() == owner).group_by(assignee)
        return {row[0]: row[1] for row in self._connection.execute(query)}

    def put(self, document: PolicyDocument, *, restored: bool = False) -> None:
        """Store a document, new or instead of the one with its id.

        Args:
            restored: it was stored before, so that its words are taken as they are, and what it requires need not
                be loaded.
        """
        kind, table = KINDS[type(document)]
        before = read_one(self._connection, type(document), document.id)
        if before == document:
            return
        if not restored:
            checks.check_vocabulary(document, before)
        checks.check_put(self._connection, document, before, restored=restored)
        values = to_json(document)
        if before is None:
            position = select(func.coalesce(func.max(table.c.position), 0) + 1).scalar_subquery()
            self._connection.execute(insert(table).values(id=document.id, position=position, document=values))
        else:
            self._connection.execute(update(table).where(table.c.id == document.id).values(document=values))
        old = None if before is None else to_json(before)
        self._changes.append(ObjectChange(kind, document.id, old, values))

    def remove(self, kind: type[D], id_: str) -> None:
        """Remove a document. Tenants are archived, not removed."""
        name, table = KINDS[kind]
        before = read_one(self._connection, kind, id_)
        if before is None:
            raise ChangeRefused(f"there is no {name} {id_!r}")
        checks.check_remove(self._connection, kind, id_)
        self._connection.execute(delete(table).where(table.c.id == id_))
        self._changes.append(ObjectChange(name, id_, to_json(before), None))

    def settle(self, *, restored: bool = False) -> None:
        """Give agreements that name a changed set their next version: they mean something else now.

        The commit does it; a caller that reads `changes` before does it itself. `restored` is as for `put`.
        """
        sets = [(change.object_id, change) for change in self._changes if change.kind == KINDS[ExpertSet][0]]
        changed = {id_: change for id_, change in sets if change.before is not None and change.after is not None}
        renewed = {change.object_id for change in self._changes if change.kind == KINDS[Agreement][0]}
        for agreement in self.all(Agreement) if changed else ():
            named = agreement.experts & changed.keys()
            if named and not restored:
                for id_ in sorted(named):
                    before, after = changed[id_].before or {}, changed[id_].after or {}
                    checks.check_required(self._connection, agreement, set(after["experts"]) - set(before["experts"]))
            if named and agreement.id not in renewed:
                version = self.next_agreement_version(agreement.id)
                self.put(agreement.model_copy(update={"version": version}), restored=True)

    def snapshot(self) -> Snapshot:
        """The policy as it would be with this change, still under the version before it."""
        return read_snapshot(self._connection)

    def keys(self, *where: ColumnElement[bool]) -> list[KeyRecord]:
        """The records of the keys of which all of `where` holds, as this transaction sees them, oldest first."""
        return read_keys(self._connection, *where)

    def has_key(self, secret: str) -> bool:
        """Whether this very key is stored, revoked or not."""
        query = select(schema.api_keys.c.id).where(schema.api_keys.c.sha256 == digest(secret))
        return self._connection.execute(query).one_or_none() is not None

    def mint_key(
        self,
        role: Role,
        *,
        tenant_id: str | None = None,
        owner_id: str | None = None,
        name: str = "",
        expires: float | None = None,
    ) -> MintedKey:
        """A new random key. The secret is in the return value and nowhere else."""
        prefix, secret = new_secret()
        record = self.add_key(
            secret,
            prefix=prefix,
            role=role,
            tenant_id=tenant_id,
            owner_id=owner_id,
            name=name,
            expires=expires,
        )
        return MintedKey(secret, record)

    def add_key(
        self,
        secret: str,
        *,
        prefix: str,
        role: Role,
        tenant_id: str | None = None,
        owner_id: str | None = None,
        name: str = "",
        expires: float | None = None,
    ) -> KeyRecord:
        """Store a key whose secret exists already (the demo's); others are minted."""
        record = KeyRecord(
            key_id=f"key_{secrets.token_hex(8)}",
            sha256=digest(secret),
            prefix=prefix,
            role=role,
            tenant_id=None if tenant_id is None else TenantId(tenant_id),
            owner_id=None if owner_id is None else OwnerId(owner_id),
            created=self._revision.at,
            expires=expires,
            name=name,
        )
        self._check_key(record)
        values = {**asdict(record), "id": record.key_id}
        del values["key_id"]
        self._connection.execute(insert(schema.api_keys).values(values))
        self._changes.append(ObjectChange("api_key", record.key_id, None, _public(record)))
        return record

    def revoke_key(self, key_id: str) -> KeyRecord:
        """Revoke a key for good, at this change's time. Revoking twice changes nothing."""
        table = schema.api_keys
        row = self._connection.execute(select(table).where(table.c.id == key_id)).one_or_none()
        if row is None:
            raise ChangeRefused(f"there is no key {key_id!r}")
        before = key_from_row(row)
        if before.revoked is not None:
            return before
        after = replace(before, revoked=self._revision.at)
        self._connection.execute(update(table).where(table.c.id == key_id).values(revoked=after.revoked))
        self._changes.append(ObjectChange("api_key", key_id, _public(before), _public(after)))
        return after

    def weights_epoch(self) -> int:
        """The newest weights epoch."""
        return newest_epoch(self._connection)

    def add_weights(self, expert: str, *, slot: int, package: str, detail: dict[str, Any]) -> int:
        """Note that an expert is loaded; returns the weights epoch."""
        return self._append_weights("added", expert, slot, package, detail)

    def revoke_weights(self, expert: str, *, slot: int, detail: dict[str, Any]) -> int:
        """Note that an expert must not be loaded any more; returns the weights epoch."""
        return self._append_weights("revoked", expert, slot, None, detail)

    def finish(self) -> bool:
        """Append the revision and the audit entries before `Store.change` commits; whether there are any."""
        self.settle()
        if self._changes:
            append(self._connection, self._revision, self._changes)
            notify(self._connection)
        events = [*(self._event(change) for change in self._changes), *self._weights]
        audit.append(self._connection, events)
        return bool(events)

    def _append_weights(
        self, action: Action, expert: str, slot: int, package: str | None, detail: dict[str, Any]
    ) -> int:
        at, actor = self._revision.at, self._revision.actor
        epoch = append_weights(
            self._connection,
            at=at,
            actor=actor,
            action=action,
            expert=expert,
            slot=slot,
            package=package,
            detail=detail,
        )
        entry = {"id": expert, "weights_epoch": epoch, "slot": slot, "package": package, "detail": detail}
        self._weights.append(Event(at=at, actor=actor, action=f"weights.{action}", detail=entry))
        return epoch

    def _event(self, change: ObjectChange) -> Event:
        return Event(
            at=self._revision.at,
            actor=self._revision.actor,
            action=f"{change.kind}.{_verb(change)}",
            detail={
                "policy_version": self._revision.version,
                "note": self._revision.note,
                "id": change.object_id,
                "before": change.before,
                "after": change.after,
            },
        )

    def _check_key(self, record: KeyRecord) -> None:
        if (record.role is Role.TENANT) != (record.tenant_id is not None):
            raise ChangeRefused("a tenant's key needs a tenant, and no other key may name one")
        if (record.role is Role.OWNER) != (record.owner_id is not None):
            raise ChangeRefused("the role 'owner' needs 'owner_id', and no other role may have it")
        if record.expires is not None and record.expires <= record.created:
            raise ChangeRefused("a key must expire after its creation")
        if record.tenant_id is not None:
            tenant = self.get(Tenant, record.tenant_id)
            if tenant is None or tenant.archived:
                raise ChangeRefused(f"there is no active tenant {record.tenant_id!r}")


def _public(record: KeyRecord) -> dict[str, Any]:
    """A key as revisions record it: without its digest."""
    values = asdict(record)
    del values["sha256"]
    return values


def _verb(change: ObjectChange) -> str:
    if change.before is None:
        return "created"
    return "deleted" if change.after is None else "updated"
