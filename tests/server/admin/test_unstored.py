"""Rights that are taken away while the store cannot be written to are gone at once, and stored once it can."""

from __future__ import annotations

from typing import Any

import pytest

from flexgate.policies.errors import StoreUnavailable
from flexgate.policies.store import Store
from flexgate.server.policy.unstored import Unstored

pytestmark = pytest.mark.asyncio

PROJECT = "/v1/organization/projects/t"
PERMISSIONS = f"{PROJECT}/expert_permissions"
WITHHELD: dict[str, tuple[str, str, Any]] = {
    "agreement": ("DELETE", "/v1/agreements/a-news", None),
    "permission": ("POST", PERMISSIONS, {"mode": "allow_list", "expert_ids": ["secret"]}),
    "permissions": ("DELETE", PERMISSIONS, None),
}


@pytest.fixture
def services(services: Any) -> Any:
    services.unstored = Unstored(services.policy)
    return services


@pytest.fixture
def full(monkeypatch: Any) -> Any:
    """A store that can be read, and not written to until `undo`."""

    def fail(*_: object) -> None:
        raise StoreUnavailable("database or disk is full")

    monkeypatch.setattr("flexgate.policies.store.audit.append", fail)
    return monkeypatch


async def _may_use_news(call: Any) -> bool:
    explained = await call("sk-t", "GET", "/v1/policy/explain")
    assert explained.status_code == 200, explained.text
    return "news" in [expert["expert"] for expert in explained.json()["experts"] if expert["allowed"]]


@pytest.mark.parametrize("taken", WITHHELD)
async def test_an_expert_is_permitted_no_more_at_once(
    call: Any, services: Any, real_store: Store, full: Any, taken: str
) -> None:
    method, path, body = WITHHELD[taken]
    version = real_store.version()
    assert await _may_use_news(call)
    answer = await call("sk-admin", method, path, json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "change_not_stored")
    assert "This server enforces the revocation and keeps trying" in answer.json()["error"]["message"]
    assert not await _may_use_news(call)
    services.policy.confirm()
    services.unstored.try_again()
    assert not await _may_use_news(call)
    assert (real_store.version(), services.unstored.waiting()) == (version, 1)
    full.undo()
    services.unstored.try_again()
    assert (real_store.version(), services.unstored.waiting()) == (version + 1, 0)
    assert not services.policy.withheld
    assert not await _may_use_news(call)


@pytest.mark.parametrize("of", ["api_keys", "service_accounts", "archive"])
async def test_a_key_is_refused_at_once(call: Any, services: Any, real_store: Store, full: Any, of: str) -> None:
    if of == "archive":
        answer = await call("sk-admin", "POST", f"{PROJECT}/archive")
    else:
        keys = (await call("sk-admin", "GET", f"{PROJECT}/api_keys")).json()["data"]
        (key,) = [key["id"] for key in keys if key["redacted_value"] == "sk-t..."]
        id_ = key if of == "api_keys" else key.replace("key_", "svc_acct_")
        answer = await call("sk-admin", "DELETE", f"{PROJECT}/{of}/{id_}")
    assert answer.json()["error"]["code"] == "change_not_stored"
    assert (await call("sk-t", "GET", "/v1/policy/explain")).status_code == 401
    full.undo()
    services.unstored.try_again()
    assert not services.policy.withheld
    assert (await call("sk-t", "GET", "/v1/policy/explain")).status_code == 401


async def test_an_admin_key_is_refused_at_once(call: Any, services: Any, full: Any) -> None:
    auditor = next(
        key["id"]
        for key in (await call("sk-admin", "GET", "/v1/organization/admin_api_keys")).json()["data"]
        if key["owner"]["role"] == "auditor"
    )
    answer = await call("sk-admin", "DELETE", f"/v1/organization/admin_api_keys/{auditor}")
    assert answer.json()["error"]["code"] == "change_not_stored"
    assert (await call("sk-auditor", "GET", "/v1/organization/projects")).status_code == 401


async def test_an_owner_takes_nothing_from_another_owner_while_the_store_fails(
    call: Any, services: Any, real_store: Store, full: Any
) -> None:
    path = "/v1/agreements/a-math"
    assert (await call("sk-owner", "DELETE", path)).status_code == 404
    full.setattr("flexgate.policies.store.agreements._own", lambda *_: None)  # the store fails before it looks
    full.setattr("flexgate.policies.store.change.Change.remove", lambda *_: _unavailable())
    assert (await call("sk-owner", "DELETE", path)).status_code == 503
    explained = (await call("sk-u", "GET", "/v1/policy/explain")).json()["experts"]
    assert [expert["allowed"] for expert in explained if expert["expert"] == "math"] == [True]
    full.undo()
    services.unstored.try_again()
    assert "a-math" in {agreement.id for agreement in _agreements(real_store)}


async def test_a_revocation_that_is_repeated_while_the_store_fails_waits_once(
    call: Any, services: Any, real_store: Store, full: Any
) -> None:
    version = real_store.version()
    for _ in range(3):
        for method, path, body in WITHHELD.values():
            assert (await call("sk-admin", method, path, json=body)).status_code == 503
    assert services.unstored.waiting() == len(services.policy.withheld) == len(WITHHELD)
    full.undo()
    services.unstored.try_again()
    assert (services.unstored.waiting(), services.policy.withheld) == (0, ())
    assert real_store.version() == version + len(WITHHELD)


async def test_of_two_permission_lists_that_wait_the_newer_one_is_stored(
    call: Any, services: Any, real_store: Store, full: Any
) -> None:
    for expert_ids in (["news"], ["secret"]):
        answer = await call("sk-admin", "POST", PERMISSIONS, json={"mode": "allow_list", "expert_ids": expert_ids})
        assert answer.json()["error"]["code"] == "change_not_stored"
        assert await _may_use_news(call) is ("news" in expert_ids)
    full.undo()
    services.unstored.try_again()
    assert (services.unstored.waiting(), services.policy.withheld) == (0, ())
    assert (await call("sk-admin", "GET", PERMISSIONS)).json()["expert_ids"] == ["secret"]


@pytest.mark.parametrize("key", ["sk-owner", "sk-admin"])
async def test_a_change_that_takes_nothing_away_does_not_wait(call: Any, services: Any, full: Any, key: str) -> None:
    full.setattr("flexgate.policies.store.store.writing", lambda *_, **__: _unavailable())
    answer = await call(key, "DELETE", "/v1/agreements/nonsense")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "policy_unavailable")
    assert (services.unstored.waiting(), services.policy.withheld) == (0, ())


async def test_what_the_store_refuses_later_is_withheld_no_longer(
    call: Any, services: Any, real_store: Store, full: Any
) -> None:
    await call("sk-admin", "DELETE", "/v1/agreements/nonsense")
    keys = (await call("sk-admin", "GET", "/v1/organization/admin_api_keys")).json()["data"]
    (admin,) = [key["id"] for key in keys if key["owner"]["role"] == "admin"]
    full.setattr("flexgate.policies.store.store.writing", lambda *_, **__: _unavailable())
    answer = await call("sk-admin", "DELETE", f"/v1/organization/admin_api_keys/{admin}")
    assert answer.json()["error"]["code"] == "change_not_stored"
    full.undo()
    services.unstored.try_again()  # it is the last admin key
    assert not services.policy.withheld


def _unavailable() -> Any:
    raise StoreUnavailable("database or disk is full")


def _agreements(store: Store) -> Any:
    from flexgate.policies.store.agreements import list_agreements

    return list_agreements(store)
