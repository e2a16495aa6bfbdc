"""What the engine was told to hold: every expert that was added or withdrawn."""

from __future__ import annotations

from typing import Final

import sqlalchemy as sa
from alembic import op

revision: Final = "0005"
down_revision: Final = "0004"
branch_labels: Final = None
depends_on: Final = None

_Version: Final = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "weights_epochs",
        sa.Column("epoch", _Version, nullable=False, autoincrement=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("actor", sa.String(200), nullable=False),
        sa.Column("action", sa.String(20), nullable=False),
        sa.Column("expert", sa.String(80), nullable=False),
        sa.Column("slot", sa.Integer(), nullable=False),
        sa.Column("package", sa.String(200)),
        sa.Column("detail", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("epoch", name=op.f("pk_weights_epochs")),
    )


def downgrade() -> None:
    op.drop_table("weights_epochs")
