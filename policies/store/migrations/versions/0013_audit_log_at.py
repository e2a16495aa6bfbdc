"""Entries of the audit log are found by their time, as statements ask for them."""

from __future__ import annotations

from typing import Final

from alembic import op

revision: Final = "0013"
down_revision: Final = "0012"
branch_labels: Final = None
depends_on: Final = None


def upgrade() -> None:
    op.create_index("ix_audit_log_at", "audit_log", ["log", "at"])


def downgrade() -> None:
    op.drop_index("ix_audit_log_at", "audit_log")
