import math

import pytest

from flexgate.server.engine.client import ExpertLease, GatedCall, GatedEngineClient, GateGrant
from flexgate.server.engine.gates import GateError, new_seal_key


def salt(*leases: ExpertLease, tenant: str = "t", client_salt: str | None = None) -> str:
    """The salt under which a call goes out; making it needs no engine."""
    client = object.__new__(GatedEngineClient)
    client._key = KEY
    return client._gate(GatedCall(GateGrant(tenant, leases, math.inf), client_salt), "request").cache_salt


KEY = new_seal_key()


def test_the_salt_names_experts_and_generations_and_no_slot() -> None:
    public, news = ExpertLease("public", 0, 1), ExpertLease("news", 1, 1)
    assert salt(public, news) == salt(public, ExpertLease("news", 5, 1))
    others = {
        salt(public),
        salt(public, ExpertLease("math", 1, 1)),
        salt(public, ExpertLease("news", 1, 2)),
        salt(public, news, tenant="u"),
        salt(public, news, client_salt="c"),
    }
    assert len(others | {salt(public, news)}) == 6


def test_nothing_goes_out_without_a_call() -> None:
    client = object.__new__(GatedEngineClient)
    with pytest.raises(GateError, match="outside of an admitted call"):
        client.generate({"prompt_token_ids": [1]}, None, "request")  # type: ignore[arg-type]
