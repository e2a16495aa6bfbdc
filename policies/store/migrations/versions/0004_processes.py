"""Processes that decide from this store, tokens used, and the key of owners' pseudonyms."""

from __future__ import annotations

import secrets
from typing import Final

import sqlalchemy as sa
from alembic import op

revision: Final = "0004"
down_revision: Final = "0003"
branch_labels: Final = None
depends_on: Final = None


def upgrade() -> None:
    number = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    op.create_table(
        "processes",
        sa.Column("id", sa.String(80), nullable=False),
        sa.Column("confirmed", number, nullable=False),
        sa.Column("lease_s", sa.Double(), nullable=False),
        sa.Column("seen", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_processes"),
    )
    op.create_table(
        "token_use",
        sa.Column("subject", sa.String(80), nullable=False),
        sa.Column("tokens", number, nullable=False),
        sa.PrimaryKeyConstraint("subject", name="pk_token_use"),
    )
    installation = op.create_table(
        "installation",
        sa.Column("name", sa.String(40), nullable=False),
        sa.Column("value", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_installation"),
    )
    op.bulk_insert(installation, [{"name": "pseudonym_key", "value": secrets.token_bytes(32)}])
    op.create_index("ix_policy_changes_kind", "policy_changes", ["kind", "object_id"])


def downgrade() -> None:
    op.drop_index("ix_policy_changes_kind", "policy_changes")
    for name in ("installation", "token_use", "processes"):
        op.drop_table(name)
