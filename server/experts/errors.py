"""Why an expert cannot be added or revoked.

ExpertError              a code for programs, a sentence for people
├── NotLoaded            no such expert is loaded, or it is none of the caller's
├── PackageRefused       the package itself may not be used
├── ChangeConflict       it cannot be changed as things stand: version, owner, slots, disk, store, another change
│   └── CommitUnknown    the store broke off, and nothing tells whether it took the change
├── NotStored            the expert is served no more by this process, and the store could not be told
├── EngineBusy           there was no place to try a new expert in; nothing is left of it
└── EngineFailed         a rank could not do its part: of an add nothing is left, a revocation stays committed
"""

from __future__ import annotations


class ExpertError(Exception):
    """What was asked for was not done. `code` is stable; `str(error)` is for the caller."""

    code = "expert_error"


class NotLoaded(ExpertError):
    """There is nothing to revoke."""

    code = "expert_not_found"


class PackageRefused(ExpertError):
    """The package is damaged, not trusted, or for another model."""

    code = "package_refused"


class ChangeConflict(ExpertError):
    """The state of the server does not allow it."""

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(message)
        self.code = code


class CommitUnknown(ChangeConflict):
    """Asked afterwards, the store did not say either."""

    def __init__(self, error: Exception, now: str) -> None:
        """`now` says what is served until somebody knows."""
        message = f"The store broke off: {error}. Nothing tells whether it took the change. {now}"
        super().__init__(message, code="commit_unknown")


class NotStored(ExpertError):
    """The store could not take a revocation, or does not say whether it did; it is tried again."""

    code = "change_not_stored"

    def __init__(self, error: Exception) -> None:
        super().__init__(
            f"The policy store could not take the change: {error}. This server serves the expert no more, has ended "
            "the requests that might use it, and tries again to store the change; other servers, and a restart before "
            "that, do not know of it."
        )


class EngineBusy(ExpertError):
    """The engine had no place to try an expert in."""

    code = "canary_not_scheduled"


class EngineFailed(ExpertError):
    """The engine did not do it."""

    code = "engine_failed"
