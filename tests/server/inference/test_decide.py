"""What a request is told when no decision can be made for it."""

from __future__ import annotations

from typing import Any

import pytest

from flexgate.policies.cache import DecisionCache
from flexgate.policies.errors import StoreUnavailable
from flexgate.policies.ids import TenantId
from flexgate.policies.store import Store
from flexgate.server.http.errors import ApiError
from flexgate.server.inference.decide import admit
from flexgate.server.inference.request import extension
from flexgate.server.inference.request.extension import Extension
from flexgate.server.policy.decision_samples import DecisionSamples
from flexgate.server.policy.live import PolicySource


async def refused(policy: PolicySource, asked: Extension, store: Store) -> ApiError:
    with pytest.raises(ApiError) as error:
        await admit(
            {extension.FIELD: asked},
            tenant=TenantId("t"),
            decision_id="d",
            policy=policy,
            cache=DecisionCache(),
            samples=DecisionSamples(store),
            now=5.0,
        )
    return error.value


@pytest.mark.asyncio
@pytest.mark.parametrize("version", [None, 7, 8])
async def test_an_outage_of_the_database_is_policy_unavailable_whatever_version_is_asked_for(
    store: Any, real_store: Store, version: int | None
) -> None:
    policy = PolicySource(store, dict, lease_s=0.05, poll_s=0.01)
    policy.confirm()
    store.answer = StoreUnavailable("gone")
    policy._confirmed = -1.0
    assert (await refused(policy, Extension(min_policy_version=version), real_store)).code == "policy_unavailable"


@pytest.mark.asyncio
async def test_a_version_that_the_database_does_not_have_is_not_reached(store: Any, real_store: Store) -> None:
    error = await refused(
        PolicySource(store, dict, lease_s=2.0, poll_s=0.01), Extension(min_policy_version=8), real_store
    )
    assert error.code == "policy_version_not_reached"
    assert "asks for policy version 8, and this server has version 7" in str(error)
