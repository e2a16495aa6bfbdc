"""Questions that requests asked of the policy, kept to be replayed."""

from __future__ import annotations

from typing import Final

import sqlalchemy as sa
from alembic import op

revision: Final = "0006"
down_revision: Final = "0005"
branch_labels: Final = None
depends_on: Final = None

_Count: Final = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "asked_questions",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("tenant_id", sa.String(80), nullable=False),
        sa.Column("purpose", sa.String(80)),
        sa.Column("region", sa.String(80)),
        sa.Column("only", sa.JSON()),
        sa.Column("ignore", sa.JSON(), nullable=False),
        sa.Column("times", _Count, nullable=False),
        sa.Column("last", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_asked_questions")),
    )


def downgrade() -> None:
    op.drop_table("asked_questions")
