"""Over HTTP, an expert without an owner is shown as such, and no agreement can be made about it."""

from __future__ import annotations

from typing import Any

import pytest
import pytest_asyncio

from flexgate.policies.documents import Expert, ExpertSet
from flexgate.policies.store import Store

pytestmark = pytest.mark.asyncio


@pytest_asyncio.fixture(autouse=True)
async def disowned(call: Any, real_store: Store, services: Any) -> None:
    """`math` has no owner any more."""
    assert (await call("sk-admin", "DELETE", "/v1/agreements/a-math")).status_code == 200
    with real_store.change(actor="test", at=2.0) as change:
        change.put(Expert(id="math", owner=None))
        change.put(ExpertSet(id="set:numbers", experts=frozenset({"math"})))
    services.policy.confirm()


async def test_the_list_says_that_it_has_no_owner(call: Any) -> None:
    shown = {key: (await call(key, "GET", "/v1/experts/math")).json() for key in ("sk-t", "sk-u", "sk-admin")}
    assert {key: card["owner"] for key, card in shown.items()} == dict.fromkeys(shown)
    assert (shown["sk-u"]["allowed"], shown["sk-t"]["allowed"]) == (True, False)
    assert shown["sk-t"]["reason"]["code"] == "not_in_allow_list"


@pytest.mark.parametrize("named", ["math", "set:numbers"])
@pytest.mark.parametrize("effect", ["permit", "prohibit", "require"])
async def test_an_agreement_about_it_is_refused_with_the_reason(call: Any, named: str, effect: str) -> None:
    body = {"owner": "gazette", "experts": ["news", named], "assignee": "everyone", "effect": effect}
    answer = await call("sk-admin", "POST", "/v1/agreements", json=body)
    assert answer.status_code == 400
    assert (
        f"names '{named}', which has no owner who could permit or prohibit it: leave it out; "
        "the projects' lists of experts decide about it" in answer.json()["error"]["message"]
    )


async def test_an_owner_cannot_tell_it_from_nonsense(call: Any) -> None:
    answers = []
    for expert in ("math", "nonsense"):
        body = {"experts": [expert], "assignee": "everyone", "effect": "permit"}
        answer = await call("sk-owner", "POST", "/v1/agreements", json=body)
        answers.append(answer.text.replace(expert, "X"))
    assert answers[0] == answers[1]
    assert (await call("sk-owner", "GET", "/v1/experts/math")).status_code == 404
