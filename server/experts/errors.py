"""Why an expert cannot be added or revoked.

ExpertError              a code for programs, a sentence for people
├── NotLoaded            no such expert is loaded, or it is none of the caller's
├── PackageRefused       the package itself may not be used
├── ChangeConflict       it cannot be changed as things stand: version, owner, slots, disk, store, another change
│   └── CommitUnknown    the connection broke; whether the change was committed is unknown
├── NotStored            this process has stopped serving the expert; the revocation is not stored
├── EngineBusy           there was no place to try a new expert in; nothing is left of it
└── EngineFailed         a rank could not do its part: of an add nothing is left, a revocation stays committed
"""

from __future__ import annotations


class ExpertError(Exception):
    """A change of experts failed. `code` is stable; `str(error)` is for the caller."""

    code = "expert_error"


class NotLoaded(ExpertError):
    """The expert to revoke is not loaded."""

    code = "expert_not_found"


class PackageRefused(ExpertError):
    """The package is damaged, not trusted, or for another model."""

    code = "package_refused"


class ChangeConflict(ExpertError):
    """The state of the server does not allow the change."""

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(message)
        self.code = code


class CommitUnknown(ChangeConflict):
    """Whether the commit succeeded could not be read afterwards."""

    def __init__(self, error: Exception, now: str) -> None:
        """`now` says what is served meanwhile, and what to do."""
        message = f"Lost the database connection: {error}. It is unknown whether the change was committed. {now}"
        super().__init__(message, code="commit_unknown")


class NotStored(ExpertError):
    """A revocation could not be stored, or its commit is unknown; it is retried."""

    code = "change_not_stored"

    def __init__(self, error: Exception) -> None:
        super().__init__(
            f"The revocation could not be stored: {error}. This server has stopped serving the expert, has ended the "
            "requests that could use it, and keeps trying to store the revocation. Until then other servers serve it, "
            "and a restart would load it: repair the policy database first."
        )


class EngineBusy(ExpertError):
    """The engine had no free place for the canary of an expert."""

    code = "canary_not_scheduled"


class EngineFailed(ExpertError):
    """A rank failed to load, clear or test an expert."""

    code = "engine_failed"
