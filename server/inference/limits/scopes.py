"""Whose limits hold for a request, and how many tokens it may use at most."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from flexgate.policies.compiled.compiler import TenantRules
from flexgate.server.inference.limits.limiter import UNLIMITED, LimitScope

_STATED: Final = ("max_completion_tokens", "max_output_tokens", "max_tokens")


def scopes_of(tenant: TenantRules, key_id: str) -> tuple[LimitScope, LimitScope]:
    """The project and the key."""
    key_quota = tenant.key_quotas.get(key_id, UNLIMITED)
    return LimitScope(tenant.id, "This project", tenant.quota), LimitScope(key_id, "This key", key_quota)


def stated_tokens(body: Mapping[str, Any]) -> int:
    """New tokens that a request says it asks for at most; 0 where it says nothing.

    What it can use is known once its prompts are tokens: `Reservation.raise_to` reserves that.
    """
    stated = next((body[name] for name in _STATED if body.get(name) is not None), 0)
    return int(stated * body.get("n", 1) * len(body.get("prompt", (None,))))
