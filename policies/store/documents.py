"""The four kinds of policy documents: their tables, and their one JSON form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, TypeVar

from pydantic import ValidationError
from sqlalchemy import Connection, Table, select

from flexgate.policies.agreements import STORED, Agreement, Document
from flexgate.policies.documents import Expert, ExpertSet, Tenant
from flexgate.policies.errors import ChangeRefused, StoreDamaged
from flexgate.policies.field_errors import first_field_error
from flexgate.policies.store import schema
from flexgate.policies.store.database import PUT_BACK

D = TypeVar("D", bound=Document)
PolicyDocument = Tenant | Expert | ExpertSet | Agreement

KINDS: Final[dict[type[Document], tuple[str, Table]]] = {
    Tenant: ("tenant", schema.tenants),
    Expert: ("expert", schema.experts),
    ExpertSet: ("expert_set", schema.expert_sets),
    Agreement: ("agreement", schema.agreements),
}


def to_json(document: Document) -> dict[str, Any]:
    """The document as JSON values; sets sorted, so that equal documents are equal JSON."""
    values = document.model_dump(mode="json")
    for name in type(document).model_fields:
        if isinstance(getattr(document, name), frozenset):
            values[name] = sorted(values[name])
    return values


def from_json(kind: type[D], values: Any) -> D:
    """The document behind stored JSON; raises `StoreDamaged`."""
    try:
        return kind.model_validate(values, context=STORED)
    except ValidationError as error:
        raise damaged(KINDS[kind][0], values, error) from error


def damaged(what: str, values: Any, error: ValidationError) -> StoreDamaged:
    """The error for a stored document that does not parse."""
    which = f" {values['id']!r}" if isinstance(values, Mapping) and "id" in values else ""
    return StoreDamaged(f"the stored {what}{which} does not parse ({first_mistake(error, what)}): {PUT_BACK}")


def checked(kind: type[D], values: dict[str, Any]) -> D:
    """Parse a new document; raises `ChangeRefused` naming the first mistake."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ChangeRefused(first_mistake(error, KINDS[kind][0])) from None


def changed(before: D, fields: dict[str, Any]) -> D:
    """A stored document with other `fields`; its own vocabulary is not checked again. Raises `ChangeRefused`."""
    try:
        return type(before).model_validate({**before.model_dump(), **fields}, context=STORED)
    except ValidationError as error:
        raise ChangeRefused(first_mistake(error, KINDS[type(before)][0])) from None


def first_mistake(error: ValidationError, whole: str) -> str:
    """The first error with its path; `whole` is what has an error of no single field."""
    return first_field_error(error).sentence(whole)


def read_all(connection: Connection, kind: type[D]) -> list[D]:
    """Every document of a kind, in the order in which they were first stored."""
    table = KINDS[kind][1]
    rows = connection.execute(select(table.c.document).order_by(table.c.position)).all()
    return [from_json(kind, row.document) for row in rows]


def read_one(connection: Connection, kind: type[D], id_: str) -> D | None:
    """One document by id."""
    table = KINDS[kind][1]
    row = connection.execute(select(table.c.document).where(table.c.id == id_)).one_or_none()
    return None if row is None else from_json(kind, row.document)
