"""Why a request was ended before its answer was complete."""

from typing import Final

GATE_EXPIRED: Final = "gate_expired"
EXPERT_REVOKED: Final = "expert_revoked"
NUMBERS_OVERFLOWED: Final = "numbers_overflowed"  # the request computed NaN or infinity
CONSTRAINT_SLOW: Final = "constraint_slow"  # what may come next took too long to find out
CONSTRAINT_FAILED: Final = "constraint_failed"  # what was sampled was none that might come next
CONSTRAINT_BUSY: Final = "constraint_busy"  # too many constraints of the tenant were waiting to be compiled
CONSTRAINT_UNAVAILABLE: Final = "constraint_unavailable"  # the process that followed it ended, through no fault of its
PERMISSION_ENDED: Final = "permission_ended"
KEY_REVOKED: Final = "key_revoked"
KEY_EXPIRED: Final = "key_expired"
PROJECT_ARCHIVED: Final = "project_archived"
POLICY_UNAVAILABLE: Final = "policy_unavailable"  # nothing confirms that the request still has its right
LEDGER_UNAVAILABLE: Final = "ledger_unavailable"  # what it uses cannot be written down
QUEUED_TOO_LONG: Final = "queued_too_long"  # its turn did not come in time
OF_THE_ENGINE: Final = frozenset(
    [
        GATE_EXPIRED,
        EXPERT_REVOKED,
        NUMBERS_OVERFLOWED,
        CONSTRAINT_SLOW,
        CONSTRAINT_FAILED,
        CONSTRAINT_BUSY,
        CONSTRAINT_UNAVAILABLE,
    ]
)
"""Stop reasons of the engine core."""
