"""Tables. Policy objects are kept as JSON documents, so that every revision can be read and diffed.

`policy_changes` holds, for each revision, what every changed object was before and after; with it
any old revision can be rebuilt from the current tables. Both revision tables are only appended to, and so
is the audit log but for its oldest denied requests.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
)

metadata: Final = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "ix": "ix_%(table_name)s_%(column_0_name)s",
    }
)

_Version: Final = BigInteger().with_variant(Integer(), "sqlite")


def _documents(name: str) -> Table:
    return Table(
        name,
        metadata,
        Column("id", String(80), primary_key=True),
        Column("position", _Version, nullable=False, unique=True),
        Column("document", JSON, nullable=False),
    )


tenants: Final = _documents("tenants")
experts: Final = _documents("experts")
expert_sets: Final = _documents("expert_sets")
agreements: Final = _documents("agreements")

api_keys: Final = Table(
    "api_keys",
    metadata,
    Column("id", String(80), primary_key=True),
    Column("sha256", LargeBinary(32), nullable=False, unique=True),
    Column("prefix", String(40), nullable=False),
    Column("role", String(20), nullable=False),
    Column("tenant_id", String(80), ForeignKey("tenants.id"), index=True),
    Column("owner_id", String(80)),
    Column("created", Double, nullable=False),
    Column("expires", Double),
    Column("revoked", Double),
    Column("name", String(200), nullable=False, server_default=""),
)

policy_revisions: Final = Table(
    "policy_revisions",
    metadata,
    Column("version", _Version, primary_key=True, autoincrement=False),
    Column("at", Double, nullable=False),
    Column("actor", String(200), nullable=False),
    Column("note", String(1000), nullable=False),
)

policy_changes: Final = Table(
    "policy_changes",
    metadata,
    Column("version", _Version, ForeignKey("policy_revisions.version"), primary_key=True),
    Column("ordinal", Integer, primary_key=True, autoincrement=False),
    Column("kind", String(20), nullable=False),
    Column("object_id", String(80), nullable=False),
    Column("before", JSON(none_as_null=True)),
    Column("after", JSON(none_as_null=True)),
    Index("ix_policy_changes_kind", "kind", "object_id"),
)

audit_log: Final = Table(
    "audit_log",
    metadata,
    Column("sequence", _Version, primary_key=True, autoincrement=False),
    Column("at", Double, nullable=False),
    Column("actor", String(200), nullable=False),
    Column("action", String(80), nullable=False),
    Column("detail", JSON, nullable=False),
    Column("previous", String(64), nullable=False),
    Column("hash", String(64), nullable=False),
    Column("log", String(20), nullable=False, server_default="changes"),
    Index("ix_audit_log_log", "log", "sequence"),
    Index("ix_audit_log_at", "log", "at"),
)

processes: Final = Table(
    "processes",
    metadata,
    Column("id", String(80), primary_key=True),
    Column("confirmed", _Version, nullable=False),
    Column("lease_s", Double, nullable=False),
    Column("seen", Double, nullable=False),
)

token_use: Final = Table(
    "token_use",
    metadata,
    Column("limit_scope", String(80), primary_key=True),
    Column("tokens", _Version, nullable=False),
)

budget_reservations: Final = Table(
    "budget_reservations",
    metadata,
    Column("limit_scope", String(80), primary_key=True),
    Column("server", String(80), primary_key=True),
    Column("amount", _Version, nullable=False),
    Column("at", Double, nullable=False),
)

use_batches: Final = Table(
    "use_batches",
    metadata,
    Column("writer", String(80), primary_key=True),
    Column("batch", _Version, nullable=False),
    Column("at", Double, nullable=False),
)

decision_samples: Final = Table(
    "decision_samples",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("tenant_id", String(80), nullable=False),
    Column("purpose", String(80)),
    Column("region", String(80)),
    Column("only", JSON(none_as_null=True)),
    Column("ignore", JSON, nullable=False),
    Column("times", _Version, nullable=False),
    Column("last", Double, nullable=False),
)

installation: Final = Table(
    "installation",
    metadata,
    Column("name", String(40), primary_key=True),
    Column("value", LargeBinary, nullable=False),
)

weights_epochs: Final = Table(
    "weights_epochs",
    metadata,
    Column("epoch", _Version, primary_key=True, autoincrement=False),
    Column("at", Double, nullable=False),
    Column("actor", String(200), nullable=False),
    Column("action", String(20), nullable=False),
    Column("expert", String(80), nullable=False),
    Column("slot", Integer, nullable=False),
    Column("package", String(200)),
    Column("detail", JSON, nullable=False),
)
