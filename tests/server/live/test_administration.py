"""A tenant's whole life with the `openai` package: one client administers, another one asks."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

import httpx
import openai
import pytest

pytestmark = pytest.mark.engine

NOW = {"wait": "all"}


@pytest.fixture(scope="module")
def admin(server: Any) -> Iterator[Any]:
    """The client that administers; it has no key that could infer."""
    with openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="none", admin_api_key=server.key("admin"), max_retries=0
    ) as client:
        yield client.admin.organization


@pytest.fixture
def project(admin: Any) -> Iterator[str]:
    """A project that is archived at the end."""
    made = admin.projects.create(name="life", extra_query=NOW)
    yield made.id
    admin.projects.archive(made.id)


def ask(server: Any, key: str, **flexgate: Any) -> Any:
    """One completion with a client of its own."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0) as client:
        return client.completions.create(
            model="tiny", prompt="the quick fox", max_tokens=4, extra_body={"flexgate": flexgate, "ignore_eos": True}
        )


def permit(server: Any, project: str, mode: str, *experts: str) -> None:
    path = f"/v1/organization/projects/{project}/expert_permissions?wait=all"
    with server.client("admin") as http:
        http.post(path, json={"mode": mode, "expert_ids": experts}).raise_for_status()


def allowed(answer: Any) -> list[str]:
    found: list[str] = answer.model_extra["flexgate"]["allowed"]
    return found


def test_a_whole_tenant_life(server: Any, admin: Any) -> None:
    project = admin.projects.create(name="Acme").id
    account = admin.projects.service_accounts.create(project, name="robot", extra_query=NOW)
    key = account.api_key.value
    assert allowed(ask(server, key)) == ["public"]

    permit(server, project, "allow_list", "news")
    answer = ask(server, key, experts={"only": ["news"]})
    assert allowed(answer) == ["public", "news"]
    assert answer.usage.completion_tokens == 4

    permit(server, project, "allow_list")
    with pytest.raises(openai.PermissionDeniedError) as denied:
        ask(server, key, experts={"only": ["news"]})
    assert denied.value.code == "expert_policy_denied"
    with (
        pytest.raises(openai.PermissionDeniedError),
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", admin_api_key=key, max_retries=0) as tenant,
    ):
        tenant.admin.organization.projects.list()

    other = admin.projects.service_accounts.create(project, name="second", extra_query=NOW).api_key.value
    admin.projects.api_keys.delete(account.api_key.id, project_id=project, extra_query=NOW)
    with pytest.raises(openai.AuthenticationError):
        ask(server, key)
    assert allowed(ask(server, other)) == ["public"]

    assert admin.projects.archive(project, extra_query=NOW).status == "archived"
    with pytest.raises(openai.AuthenticationError):
        ask(server, other)
    assert project not in [p.id for p in admin.projects.list()]

    told = _audited(admin, project)
    for type_ in ("project.created", "api_key.created", "api_key.deleted", "project.archived", "request.denied"):
        assert type_ in told, type_


def _audited(admin: Any, project: str) -> list[str]:
    """Types of the project's entries, once denied requests have been written."""
    deadline = time.monotonic() + 5
    while True:
        types = [log.type for log in admin.audit_logs.list(project_ids=[project])]
        if "request.denied" in types or time.monotonic() > deadline:
            return types
        time.sleep(0.1)


def test_the_admin_key_cannot_infer_and_the_data_key_cannot_administer(server: Any) -> None:
    with pytest.raises(openai.PermissionDeniedError):
        ask(server, server.key("admin"))
    with server.client("all") as http:
        assert http.post("/v1/organization/projects", json={"name": "mine"}).status_code == 403


def test_an_agreement_that_ends_ends_for_requests_and_explanations(server: Any, project: str, admin: Any) -> None:
    key = admin.projects.service_accounts.create(project, name="robot", extra_query=NOW).api_key.value
    permit(server, project, "deny_list")
    assert "math" in allowed(ask(server, key))
    ban = {"owner": "academy", "experts": ["math"], "assignee": f"tenant:{project}", "effect": "prohibit"}
    with server.client("admin") as http:
        made = http.post("/v1/agreements?wait=all", json=ban)
        assert made.status_code == 200, made.text
        assert "math" not in allowed(ask(server, key))
        explained = http.get("/v1/policy/explain", params={"project_id": project}).json()
        reason = next(e["reason"] for e in explained["experts"] if e["expert"] == "math")
        assert (reason["code"], reason["rule"]) == ("prohibited", f"agreement/{made.json()['id']}@1")
        assert http.delete(f"/v1/agreements/{made.json()['id']}?wait=all").status_code == 200
    assert "math" in allowed(ask(server, key))


def test_a_stream_across_the_end_of_a_licence_stops_there_and_says_why(server: Any, project: str, admin: Any) -> None:
    key = admin.projects.service_accounts.create(project, name="robot").api_key.value
    permit(server, project, "allow_list", "math")
    end = math.ceil(time.time()) + 3
    when = datetime.fromtimestamp(end, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    ban = {"owner": "academy", "experts": ["math"], "assignee": f"tenant:{project}", "effect": "prohibit"}
    with server.client("admin") as http:
        http.post("/v1/agreements?wait=all", json={**ban, "not_before": when}).raise_for_status()
    time.sleep(max(0.0, end - 1.0 - time.time()))
    body = {"prompt": "x", "max_tokens": 1000, "ignore_eos": True, "stream": True}
    body["flexgate"] = {"experts": {"only": ["math"]}}
    headers = {"authorization": f"Bearer {key}"}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, headers=headers, timeout=60) as response:
        assert response.status_code == 200
        events = [(time.time(), line.removeprefix("data: ")) for line in response.iter_lines() if line]
    texts = [at for at, data in events if data.startswith('{"id"')]
    errors = [json.loads(data)["error"]["code"] for _, data in events if data.startswith('{"error"')]
    assert 0 < len(texts) < 1000, "the stream ended by itself"
    assert errors == ["expert_permission_ended"]
    assert max(texts) < end + 0.5
    with pytest.raises(openai.PermissionDeniedError, match="prohibits this project from using expert 'math'"):
        ask(server, key, experts={"only": ["math"]})


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses"])
def test_limits_count_what_the_engine_used(server: Any, project: str, admin: Any, path: str, stream: bool) -> None:
    key = admin.projects.service_accounts.create(project, name="robot").api_key.value
    admin.projects.rate_limits.update_rate_limit(
        "rl-project", project_id=project, max_tokens_per_1_minute=1000, extra_query=NOW
    )
    asked = {
        "/v1/completions": {"prompt": ["the quick", "the lazy dog"], "n": 2, "max_tokens": 5, "ignore_eos": True},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 5},
        "/v1/responses": {"input": "hello", "max_output_tokens": 5},
    }[path]
    headers = {"authorization": f"Bearer {key}"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=60) as http:
        plain = http.post(path, json=asked)
        assert plain.status_code == 200, plain.text
        usage = plain.json()["usage"]["total_tokens"]
        used = usage
        if stream:
            with http.stream("POST", path, json={**asked, "stream": True}) as response:
                response.read()
            used = 2 * usage if path == "/v1/completions" else None
        remaining = _remaining(http)
    if used is not None:
        assert 1000 - remaining == used
    else:
        assert 0 < 1000 - remaining - usage < 60


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
def test_six_requests_at_once_that_state_no_length_use_what_is_left_of_a_budget(
    server: Any, project: str, admin: Any, path: str
) -> None:
    """One is cut to it; the others find nothing left."""
    key = admin.projects.service_accounts.create(project, name="robot").api_key.value
    admin.projects.rate_limits.update_rate_limit(
        "rl-project", project_id=project, extra_body={"max_tokens_per_1_day": 60}, extra_query=NOW
    )
    asked = {
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "hello"}], "ignore_eos": True},
        "/v1/responses": {"input": "hello", "ignore_eos": True},
    }[path]
    with (
        httpx.Client(base_url=server.url, headers={"authorization": f"Bearer {key}"}, timeout=60) as http,
        ThreadPoolExecutor(6) as pool,
    ):
        answers = list(pool.map(lambda _: http.post(path, json=asked), range(6)))
    assert sorted(one.status_code for one in answers) == [200] + [429] * 5
    assert {one.json()["error"]["code"] for one in answers if one.status_code == 429} == {"insufficient_quota"}
    (served,) = (one.json() for one in answers if one.status_code == 200)
    usage = served["usage"]
    assert usage["total_tokens"] == 60
    assert served["flexgate"]["max_tokens"] == usage.get("completion_tokens", usage.get("output_tokens"))
    if path == "/v1/responses":
        assert (served["status"], served["incomplete_details"]["reason"]) == ("incomplete", "max_output_tokens")
    else:
        assert served["choices"][0]["finish_reason"] == "length"


def test_limits_count_up_to_a_stop_string(server: Any, project: str, admin: Any) -> None:
    key = admin.projects.service_accounts.create(project, name="robot").api_key.value
    admin.projects.rate_limits.update_rate_limit(
        "rl-project", project_id=project, max_tokens_per_1_minute=1000, extra_query=NOW
    )
    asked = {"prompt": "the quick", "max_tokens": 30, "ignore_eos": True, "temperature": 0}
    with httpx.Client(base_url=server.url, headers={"authorization": f"Bearer {key}"}, timeout=60) as http:
        whole = http.post("/v1/completions", json=asked).json()
        text = whole["choices"][0]["text"]
        stopped = http.post("/v1/completions", json={**asked, "stop": text[len(text) // 2 :][:3]}).json()
        assert stopped["choices"][0]["finish_reason"] == "stop"
        usages = [answer["usage"]["total_tokens"] for answer in (whole, stopped)]
        assert usages[1] < usages[0]
        assert 1000 - _remaining(http) == sum(usages)


@pytest.mark.parametrize("more", [{}, {"stream": True, "stream_interval": 5000}], ids=["plain", "rare events"])
def test_who_leaves_before_the_answer_is_charged_for_what_was_generated(
    server: Any, project: str, admin: Any, more: dict[str, Any]
) -> None:
    key = admin.projects.service_accounts.create(project, name="robot").api_key.value
    admin.projects.rate_limits.update_rate_limit(
        "rl-project", project_id=project, max_tokens_per_1_minute=9000, extra_query=NOW
    )
    asked = {"prompt": "the quick brown fox", "max_tokens": 1000, "n": 8, "ignore_eos": True, **more}
    with httpx.Client(base_url=server.url, headers={"authorization": f"Bearer {key}"}, timeout=60) as http:
        prompt = http.post("/tokenize", json={"prompt": asked["prompt"]}).json()["count"]
        with pytest.raises(httpx.ReadTimeout), http.stream("POST", "/v1/completions", json=asked, timeout=1) as leaving:
            leaving.read()
        used, deadline = 8000, time.monotonic() + 10
        while used >= 8000 and time.monotonic() < deadline:  # held until the server has seen that nobody is there
            time.sleep(0.1)
            used = 9000 - int(http.post("/tokenize", json={"prompt": "x"}).headers["x-ratelimit-remaining-tokens"])
    assert prompt + 8 < used < 8000


def _remaining(http: httpx.Client) -> int:
    """Tokens that remained before a next request, which is told what remains after its own."""
    answer = http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1})
    assert answer.status_code == 200, answer.text
    return int(answer.headers["x-ratelimit-remaining-tokens"]) + int(answer.json()["usage"]["total_tokens"])


def test_one_request_too_many_is_429(server: Any, project: str, admin: Any) -> None:
    key = admin.projects.service_accounts.create(project, name="robot").api_key.value
    admin.projects.rate_limits.update_rate_limit(
        "rl-project", project_id=project, max_requests_per_1_minute=1, extra_query=NOW
    )
    ask(server, key)
    with pytest.raises(openai.RateLimitError) as limited:
        ask(server, key)
    assert limited.value.code == "rate_limit_exceeded"
    assert limited.value.response.headers["x-ratelimit-remaining-requests"] == "0"
