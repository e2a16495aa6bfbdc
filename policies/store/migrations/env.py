"""Alembic's entry point: runs inside the connection and transaction that `migrate` opened."""

from __future__ import annotations

from alembic import context

from flexgate.policies.store.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,
)
context.run_migrations()
