"""What a request is told when no decision can be made for it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from flexgate.policies.errors import StoreUnavailable
from flexgate.server.http.auth import STATE, Context
from flexgate.server.http.errors import ApiError
from flexgate.server.inference.pipeline import TenantRequest
from flexgate.server.policy.source import PolicySource


async def refused(policy: PolicySource, version: int | None) -> ApiError:
    http: Any = SimpleNamespace(scope={STATE: Context("req_1")})
    services: Any = SimpleNamespace(policy=policy, clock=lambda: 5.0)
    with pytest.raises(ApiError) as error:
        await TenantRequest(http, services).judge(version)
    return error.value


@pytest.mark.asyncio
@pytest.mark.parametrize("version", [None, 7, 8])
async def test_an_outage_of_the_database_is_policy_unavailable_whatever_version_is_asked_for(
    store: Any, version: int | None
) -> None:
    policy = PolicySource(store, dict, lease_s=0.05, poll_s=0.01)
    policy.confirm()
    store.answer = StoreUnavailable("gone")
    policy._confirmed = -1.0
    assert (await refused(policy, version)).code == "policy_unavailable"


@pytest.mark.asyncio
async def test_a_version_that_the_database_does_not_have_is_not_reached(store: Any) -> None:
    error = await refused(PolicySource(store, dict, lease_s=2.0, poll_s=0.01), 8)
    assert error.code == "policy_version_not_reached"
    assert "asks for policy version 8, and this server has version 7" in str(error)
