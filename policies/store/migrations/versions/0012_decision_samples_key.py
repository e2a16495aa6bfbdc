"""The primary key of decision samples is named after their table."""

from __future__ import annotations

from typing import Final

import sqlalchemy as sa
from alembic import op

revision: Final = "0012"
down_revision: Final = "0011"
branch_labels: Final = None
depends_on: Final = None


def upgrade() -> None:
    _named("pk_decision_samples")


def downgrade() -> None:
    _named("pk_asked_questions")


def _named(key: str) -> None:
    """By a copy: SQLite cannot rename a constraint."""
    op.create_table(
        "samples",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("tenant_id", sa.String(80), nullable=False),
        sa.Column("purpose", sa.String(80)),
        sa.Column("region", sa.String(80)),
        sa.Column("only", sa.JSON()),
        sa.Column("ignore", sa.JSON(), nullable=False),
        sa.Column("times", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("last", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f(key)),
    )
    op.execute("INSERT INTO samples SELECT * FROM decision_samples")
    op.drop_table("decision_samples")
    op.rename_table("samples", "decision_samples")
