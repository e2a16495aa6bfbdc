"""A tenant's standing set is its default expert set, in what is stored now and in the history."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import sqlalchemy as sa
from alembic import op

revision: Final = "0009"
down_revision: Final = "0008"
branch_labels: Final = None
depends_on: Final = None

_PAGE: Final = 500
_TENANTS: Final = sa.table("tenants", sa.column("id"), sa.column("document", sa.JSON))
_CHANGES: Final = sa.table(
    "policy_changes",
    sa.column("version"),
    sa.column("ordinal"),
    sa.column("kind"),
    sa.column("before", sa.JSON(none_as_null=True)),
    sa.column("after", sa.JSON(none_as_null=True)),
)


def upgrade() -> None:
    _rename("standing", "default_experts")


def downgrade() -> None:
    _rename("default_experts", "standing")


def _rename(old: str, new: str) -> None:
    """In parts: a history may be longer than memory has room for."""
    connection = op.get_bind()
    for tenant in _pages(connection, _TENANTS, [_TENANTS.c.id]):
        stored = _TENANTS.c.id == tenant.id
        connection.execute(sa.update(_TENANTS).where(stored).values(document=_renamed(tenant.document, old, new)))
    for change in _pages(connection, _CHANGES, [_CHANGES.c.version, _CHANGES.c.ordinal], _CHANGES.c.kind == "tenant"):
        stored = sa.and_(_CHANGES.c.version == change.version, _CHANGES.c.ordinal == change.ordinal)
        values = {"before": _renamed(change.before, old, new), "after": _renamed(change.after, old, new)}
        connection.execute(sa.update(_CHANGES).where(stored).values(values))


def _pages(
    connection: sa.Connection, table: sa.TableClause, key: list[sa.ColumnClause[Any]], *only: sa.ColumnElement[bool]
) -> Iterator[sa.Row[Any]]:
    """The rows of a table, a few of them in memory at a time."""
    page = sa.select(table).where(*only).order_by(*key).limit(_PAGE)
    rows = connection.execute(page).all()
    while rows:
        yield from rows
        after = sa.tuple_(*key) > sa.tuple_(*(getattr(rows[-1], column.name) for column in key))
        rows = connection.execute(page.where(after)).all()


def _renamed(document: dict[str, object] | None, old: str, new: str) -> dict[str, object] | None:
    return None if document is None else {new if name == old else name: value for name, value in document.items()}
