"""What tests of requests for inference share."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
from generating import Generating

from flexgate.policies.documents import Quota


@pytest.fixture
def limit(store: Any, services: Any) -> Any:
    """Set the limits of project t, and of its key."""

    def set_(key_quota: Quota | None = None, **quota: Any) -> None:
        snapshot = store.answer
        keys = {} if key_quota is None else {"key_sk-t": key_quota}
        tenant = replace(snapshot.tenants["t"], quota=Quota(**quota), key_quotas=keys)
        store.answer = replace(snapshot, tenants=MappingProxyType({**snapshot.tenants, "t": tenant}))
        services.policy.confirm()
        services.policy._served = None
        services.budget_usage.refresh()

    return set_


@pytest.fixture
def generating(services: Any) -> Any:
    """Install a handler for completions, and return it."""

    def answer(handler: Generating) -> Generating:
        services.handlers.completion = SimpleNamespace(create_completion=handler)
        return handler

    return answer
