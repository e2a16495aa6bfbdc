"""Documents and agreements may say more than before: grades, requirements, budgets in money. No table changes.

An older version takes such a document for a damaged one; by this number it knows that the store is newer.
"""

from __future__ import annotations

from typing import Final

revision: Final = "0014"
down_revision: Final = "0013"
branch_labels: Final = None
depends_on: Final = None


def upgrade() -> None:
    """Nothing to change."""


def downgrade() -> None:
    """Nothing to change: what was said in newer words, the older version does not read."""
