"""First tables: policy documents, keys, revisions."""

from __future__ import annotations

from typing import Final

import sqlalchemy as sa
from alembic import op

revision: Final = "0001"
down_revision: Final = None
branch_labels: Final = None
depends_on: Final = None


def upgrade() -> None:
    version = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    for name in ("tenants", "experts", "expert_sets", "agreements"):
        op.create_table(
            name,
            sa.Column("id", sa.String(80), nullable=False),
            sa.Column("position", version, nullable=False),
            sa.Column("document", sa.JSON(), nullable=False),
            sa.PrimaryKeyConstraint("id", name=f"pk_{name}"),
            sa.UniqueConstraint("position", name=f"uq_{name}_position"),
        )
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(80), nullable=False),
        sa.Column("sha256", sa.LargeBinary(32), nullable=False),
        sa.Column("prefix", sa.String(40), nullable=False),
        sa.Column("role", sa.String(20), nullable=False),
        sa.Column("tenant_id", sa.String(80)),
        sa.Column("owner_id", sa.String(80)),
        sa.Column("created", sa.Double(), nullable=False),
        sa.Column("expires", sa.Double()),
        sa.Column("revoked", sa.Double()),
        sa.PrimaryKeyConstraint("id", name="pk_api_keys"),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name="fk_api_keys_tenant_id"),
        sa.UniqueConstraint("sha256", name="uq_api_keys_sha256"),
    )
    op.create_index("ix_api_keys_tenant_id", "api_keys", ["tenant_id"])
    op.create_table(
        "policy_revisions",
        sa.Column("version", version, autoincrement=False, nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("actor", sa.String(200), nullable=False),
        sa.Column("note", sa.String(1000), nullable=False),
        sa.PrimaryKeyConstraint("version", name="pk_policy_revisions"),
    )
    op.create_table(
        "policy_changes",
        sa.Column("version", version, nullable=False),
        sa.Column("ordinal", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("kind", sa.String(20), nullable=False),
        sa.Column("object_id", sa.String(80), nullable=False),
        sa.Column("before", sa.JSON(none_as_null=True)),
        sa.Column("after", sa.JSON(none_as_null=True)),
        sa.PrimaryKeyConstraint("version", "ordinal", name="pk_policy_changes"),
        sa.ForeignKeyConstraint(["version"], ["policy_revisions.version"], name="fk_policy_changes_version"),
    )


def downgrade() -> None:
    for name in (
        "policy_changes",
        "policy_revisions",
        "api_keys",
        "agreements",
        "expert_sets",
        "experts",
        "tenants",
    ):
        op.drop_table(name)
