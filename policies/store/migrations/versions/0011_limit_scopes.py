"""Used tokens are counted by limit scope."""

from __future__ import annotations

from typing import Final

from alembic import op

revision: Final = "0011"
down_revision: Final = "0010"
branch_labels: Final = None
depends_on: Final = None


def upgrade() -> None:
    op.execute("ALTER TABLE token_use RENAME COLUMN subject TO limit_scope")


def downgrade() -> None:
    op.execute("ALTER TABLE token_use RENAME COLUMN limit_scope TO subject")
