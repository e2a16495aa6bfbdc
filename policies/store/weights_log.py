"""Log of the experts to be loaded: one row per change, append-only.

The rows are committed in the transaction that changes the catalogue, so that a server which comes
back after a crash finds the last acknowledged state and nothing else. An expert without a row is
where the checkpoint put it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from pydantic import TypeAdapter, ValidationError
from sqlalchemy import Connection, RowMapping, func, insert, select

from flexgate.policies.store.documents import damaged
from flexgate.policies.store.schema import weights_epochs

FIRST_EPOCH: Final = 1
"""The checkpoint as it is, before any change."""

Action = Literal["added", "revoked"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsChange:
    """One expert added to a slot, or revoked from it.

    `package` names the private copy that it was loaded from, None for an expert of the checkpoint;
    `detail` is JSON for people: version, digests. `at` is Unix seconds.
    """

    epoch: int
    at: float
    actor: str
    action: Action
    expert: str
    slot: int
    package: str | None
    detail: dict[str, Any]


_CHANGE: Final = TypeAdapter(WeightsChange)


@dataclass(frozen=True, slots=True)
class WeightsState:
    """The newest epoch, and each expert's last change."""

    epoch: int
    last: Mapping[str, WeightsChange]

    @property
    def revoked(self) -> frozenset[str]:
        """Experts that must not be loaded, wherever they come from."""
        return frozenset(name for name, change in self.last.items() if change.action == "revoked")

    @property
    def added(self) -> tuple[WeightsChange, ...]:
        """Experts to load from packages, in the order of their epochs."""
        added = (change for change in self.last.values() if change.action == "added")
        return tuple(sorted(added, key=lambda change: change.epoch))


def weights_state(connection: Connection) -> WeightsState:
    """The experts to be loaded, as a transaction sees them."""
    epoch = weights_epochs.c.epoch
    last = select(func.max(epoch)).group_by(weights_epochs.c.expert)
    rows = connection.execute(select(weights_epochs).where(epoch.in_(last)).order_by(epoch))
    changes = [_change(row._mapping) for row in rows]
    return WeightsState(newest_epoch(connection), {change.expert: change for change in changes})


def newest_epoch(connection: Connection) -> int:
    """The epoch of the last change of all."""
    return connection.scalar(select(func.max(weights_epochs.c.epoch))) or FIRST_EPOCH


def revocation_epochs(connection: Connection) -> dict[str, int]:
    """The epoch of each expert's last revocation, also of one that was added again since."""
    table = weights_epochs.c
    query = select(table.expert, func.max(table.epoch)).where(table.action == "revoked").group_by(table.expert)
    return dict(connection.execute(query).tuples().all())


def _change(values: RowMapping) -> WeightsChange:
    try:
        return _CHANGE.validate_python(dict(values))
    except ValidationError as error:
        raise damaged("change of weights", {"id": values["epoch"]}, error) from error


def append_weights(
    connection: Connection,
    *,
    at: float,
    actor: str,
    action: Action,
    expert: str,
    slot: int,
    package: str | None,
    detail: dict[str, Any],
) -> int:
    """Append a change inside the caller's writing transaction; returns its epoch."""
    epoch = newest_epoch(connection) + 1
    values = {"epoch": epoch, "at": at, "actor": actor, "action": action, "expert": expert, "slot": slot}
    connection.execute(insert(weights_epochs).values(**values, package=package, detail=detail))
    return epoch
