"""What each server has reserved of budgets, so that no other grants it."""

from __future__ import annotations

from typing import Final

import sqlalchemy as sa
from alembic import op

revision: Final = "0015"
down_revision: Final = "0014"
branch_labels: Final = None
depends_on: Final = None


def upgrade() -> None:
    op.create_table(
        "budget_reservations",
        sa.Column("limit_scope", sa.String(80), nullable=False),
        sa.Column("server", sa.String(80), nullable=False),
        sa.Column("amount", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("limit_scope", "server", name="pk_budget_reservations"),
    )


def downgrade() -> None:
    op.drop_table("budget_reservations")
