"""Gates through HTTP and the real engine."""

from __future__ import annotations

import uuid
from typing import Any

import pytest

pytestmark = pytest.mark.engine

BODY = {"prompt": "the quick brown fox jumps", "max_tokens": 6, "temperature": 0, "logprobs": 5}


def ask(server: Any, who: str, **more: Any) -> dict[str, Any]:
    with server.client(who) as http:
        response = http.post("/v1/completions", json={**BODY, **more})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def used(answer: dict[str, Any]) -> dict[str, tuple[float, int]]:
    experts = answer["flexgate"]["attribution"]["experts"]
    return {e["id"]: (e["gate_mass"], e["tokens"]) for e in experts}


def only(*experts: str) -> dict[str, Any]:
    return {"experts": {"only": list(experts)}}


def test_each_tenant_gets_its_own_gate(server: Any) -> None:
    allowed = {who: ask(server, who)["flexgate"]["allowed"] for who in ("all", "press", "public")}
    assert allowed == {
        "all": ["public", "news", "math", "code", "secret"],
        "press": ["public", "news"],
        "public": ["public"],
    }


def test_an_excluded_expert_has_exactly_nothing(server: Any) -> None:
    parts = used(ask(server, "press"))
    assert parts.keys() == {"public", "news", "math", "code"}
    assert parts["math"] == parts["code"] == (0.0, 0)
    assert parts["public"][1] > 0


def test_a_request_filter_gives_what_fewer_agreements_give(server: Any) -> None:
    """`all`, filtered to what `press` has, is answered like `press`, bit for bit."""
    filtered = ask(server, "all", flexgate=only("news"), cache_salt="a")
    licensed = ask(server, "press", cache_salt="b")
    assert filtered["choices"] == licensed["choices"]
    parts, others = used(filtered), used(licensed)
    assert {e: parts[e] for e in others} == others
    assert filtered["choices"] != ask(server, "all")["choices"]


def test_the_anchor_can_go_where_the_tenant_may_do_without(server: Any) -> None:
    answer = ask(server, "free", flexgate={"experts": {"ignore": ["public"]}})
    assert answer["flexgate"]["allowed"] == ["news", "math", "code"]
    assert used(answer)["public"] == (0.0, 0)


def test_the_cache_is_shared_within_a_gate_and_never_across(server: Any) -> None:
    prompt = uuid.uuid4().hex + " the quick brown fox jumps over the lazy dog and reads the news" * 40

    def cached(who: str, **more: Any) -> int:
        answer = ask(server, who, prompt=prompt, max_tokens=1, **more)
        count: int = answer["flexgate"]["attribution"]["cached_prompt_tokens"]
        return count

    assert cached("all") == 0
    assert cached("all") > 0
    assert cached("all", flexgate=only("news")) == 0
    assert cached("press") == 0
    assert cached("free") == 0
    assert cached("all", cache_salt="mine") == 0
    assert cached("all", cache_salt="mine") > 0
    assert cached("press", cache_salt="mine") == 0


@pytest.mark.parametrize("prompts", [1, 2])
@pytest.mark.parametrize("choices", [1, 3])
def test_a_prompt_is_attributed_once_for_all_its_choices(server: Any, prompts: int, choices: int) -> None:
    texts = [f"{number} the quick brown fox" for number in range(prompts)]
    answer = ask(server, "public", prompt=texts, n=choices, temperature=1)
    usage = answer["usage"]
    read = usage["prompt_tokens"] + usage["completion_tokens"] - prompts * choices  # not the last of each choice
    assert used(answer)["public"] == (pytest.approx(read, rel=1e-6), read)


def test_hidden_and_unknown_experts_are_alike(server: Any) -> None:
    with server.client("press") as http:
        hidden = http.post("/v1/completions", json={**BODY, "flexgate": only("secret")})
        unknown = http.post("/v1/completions", json={**BODY, "flexgate": only("nonsense")})
        assert (hidden.status_code, hidden.content) == (404, unknown.content)
        listed = [e["id"] for e in http.get("/v1/experts").json()["data"]]
    assert listed == ["public", "news", "math", "code"]


def test_a_changed_policy_holds_for_the_next_request(server: Any) -> None:
    import time

    from flexgate.policies.documents import Tenant
    from flexgate.policies.store.store import Store

    store = Store.open(f"sqlite:///{server.database}")
    try:
        with store.change(actor="test", at=time.time()) as change:
            tenant = change.get(Tenant, "proj_public")
            assert tenant is not None
            change.put(tenant.model_copy(update={"expert_ids": frozenset({"math"})}))
            version = change.policy_version
        answer = ask(server, "public", flexgate={"min_policy_version": version})
        assert answer["flexgate"]["allowed"] == ["public", "math"]
        with store.change(actor="test", at=time.time()) as change:
            change.put(tenant)
            version = change.policy_version
        answer = ask(server, "public", flexgate={"min_policy_version": version})
        assert answer["flexgate"]["allowed"] == ["public"]
        assert answer["flexgate"]["policy_version"] == version
    finally:
        store.close()
