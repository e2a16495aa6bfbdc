"""Denied requests have a log of their own, which may be trimmed."""

from __future__ import annotations

from typing import Final

import sqlalchemy as sa
from alembic import op

revision: Final = "0007"
down_revision: Final = "0006"
branch_labels: Final = None
depends_on: Final = None


def upgrade() -> None:
    op.add_column("audit_log", sa.Column("log", sa.String(20), nullable=False, server_default="changes"))
    op.create_index("ix_audit_log_log", "audit_log", ["log", "sequence"])


def downgrade() -> None:
    op.drop_index("ix_audit_log_log", "audit_log")
    op.drop_column("audit_log", "log")
