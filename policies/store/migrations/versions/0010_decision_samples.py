"""What requests asked of the policy is a decision sample."""

from __future__ import annotations

from typing import Final

from alembic import op

revision: Final = "0010"
down_revision: Final = "0009"
branch_labels: Final = None
depends_on: Final = None


def upgrade() -> None:
    op.rename_table("asked_questions", "decision_samples")


def downgrade() -> None:
    op.rename_table("decision_samples", "asked_questions")
