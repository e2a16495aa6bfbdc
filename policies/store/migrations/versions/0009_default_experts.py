"""A tenant's standing set is its default expert set, in what is stored now and in the history."""

from __future__ import annotations

from typing import Final

import sqlalchemy as sa
from alembic import op

revision: Final = "0009"
down_revision: Final = "0008"
branch_labels: Final = None
depends_on: Final = None

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
    connection = op.get_bind()
    for row in connection.execute(sa.select(_TENANTS)).all():
        stored = _TENANTS.c.id == row.id
        connection.execute(sa.update(_TENANTS).where(stored).values(document=_renamed(row.document, old, new)))
    for row in connection.execute(sa.select(_CHANGES).where(_CHANGES.c.kind == "tenant")).all():
        stored = sa.and_(_CHANGES.c.version == row.version, _CHANGES.c.ordinal == row.ordinal)
        values = {"before": _renamed(row.before, old, new), "after": _renamed(row.after, old, new)}
        connection.execute(sa.update(_CHANGES).where(stored).values(values))


def _renamed(document: dict[str, object] | None, old: str, new: str) -> dict[str, object] | None:
    return None if document is None else {new if name == old else name: value for name, value in document.items()}
