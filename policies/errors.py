"""Errors of the policy package. HTTP status codes are chosen in `flexgate.server` alone.

PolicyError
├── InvalidName            an id or a word that the vocabulary does not know
├── SnapshotInvalid        documents that do not fit together
├── SnapshotStale          the snapshot was not confirmed within its lease
├── VersionNotReached      the snapshot is confirmed, and older than the version that was asked for
├── ClockInvalid           the time given is not a number
├── AuditBroken            the audit log was edited, reordered or cut off
├── DecisionRefused        a request that gets no gate; `param` names the field at fault
│   ├── UnknownTenant
│   ├── TenantArchived
│   ├── ContextRefused     a purpose or region that the tenant may not declare
│   ├── UnknownExpert      unknown and hidden alike, byte for byte
│   ├── ExpertDenied       listed, but not allowed; carries `reasons`
│   ├── ExpertRequired     a required expert ignored
│   ├── RequiredExpertMissing  a required expert is not served, or not permitted
│   ├── EmptyGate          nothing left; never widened
│   ├── LayerWithoutExpert  what is left has no expert in some layer
│   └── GradeTooLow        what is excluded is excluded less completely than the tenant demands
└── StoreError
    ├── StoreUnavailable   no connection, locked, not a database
    │   ├── StoreReplaced  another file, or none, where the one was that this process opened
    │   └── StoreFull      no room on the disk but what is kept for taking rights away
    ├── StoreFromNewerVersion
    ├── StoreRolledBack    older than what was read from it before
    ├── StoreDamaged       rows that no longer parse
    ├── ObjectUnknown      absent and not the caller's alike
    └── ChangeRefused      a change that would not make sense
        └── ConfirmationRequired   a rollback that was not confirmed
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flexgate.policies.decision import Reason


class PolicyError(Exception):
    """Root of every error this package raises on purpose."""


class InvalidName(PolicyError, ValueError):
    """An id or word outside its vocabulary; a ValueError so that pydantic reports its place."""


class SnapshotInvalid(PolicyError):
    """Tenants, agreements, experts and keys that contradict each other."""


class SnapshotStale(PolicyError):
    """No snapshot was confirmed within the lease: nothing may be decided from it."""


class VersionNotReached(PolicyError):
    """The confirmed snapshot is older than the policy version that a request asks for."""

    def __init__(self, version: int, *, current: int) -> None:
        super().__init__(f"policy version {version} was not reached in time; the current one is {current}")
        self.current = current


class ClockInvalid(PolicyError):
    """The time given is not a number."""


class AuditBroken(PolicyError):
    """The audit log was changed after it was written."""


class DecisionRefused(PolicyError):
    """No gate for this request. `str(error)` is the sentence for the caller."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class UnknownTenant(DecisionRefused):
    """No tenant of that id is in the snapshot."""


class TenantArchived(DecisionRefused):
    """The tenant exists, but is archived."""


class ContextRefused(DecisionRefused):
    """The purpose or region is no known word, or not registered for the tenant."""


class UnknownExpert(DecisionRefused):
    """The request names an expert or set that is not listed for the tenant."""


class ExpertDenied(DecisionRefused):
    """The request asks for listed experts that the policy does not allow."""

    def __init__(self, message: str, *, reasons: Sequence[Reason], param: str) -> None:
        super().__init__(message, param=param)
        self.reasons = tuple(reasons)


class ExpertRequired(DecisionRefused):
    """The request ignores an expert that must take part in it."""


class RequiredExpertMissing(DecisionRefused):
    """An expert that must take part in the request cannot."""


class EmptyGate(DecisionRefused):
    """The request filter left no expert at all."""


class LayerWithoutExpert(DecisionRefused):
    """The experts of the request leave a layer of the model without any."""


class GradeTooLow(DecisionRefused):
    """Excluding an expert excludes less than the tenant demands."""


class StoreError(PolicyError):
    """The store failed or refused; nothing was changed."""


class StoreUnavailable(StoreError):
    """The database cannot be reached, is locked, or is not a database."""


class StoreReplaced(StoreUnavailable):
    """A file that this process has open was replaced or deleted."""


class StoreFull(StoreUnavailable):
    """The disk has no room for ordinary changes; revocations still succeed."""


class StoreFromNewerVersion(StoreError):
    """The schema was migrated by a newer flexgate."""


class StoreRolledBack(StoreError):
    """The store went back to an older version, for example from a backup."""


class StoreDamaged(StoreError):
    """A stored document no longer parses, or the documents do not fit together."""


class ObjectUnknown(StoreError):
    """The object does not exist, or the caller may not see it."""


class ChangeRefused(StoreError):
    """The change names things that do not exist, or contradicts what is there."""


class ConfirmationRequired(ChangeRefused):
    """The rollback would change something and was not confirmed with the present version."""
