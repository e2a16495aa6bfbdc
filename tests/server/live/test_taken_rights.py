"""Running requests of a real server end with the right that they live on, before `wait=all` is answered."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytestmark = pytest.mark.engine

EXPERT = {"experts": {"only": ["math"]}}
BODY = {"model": "tiny", "prompt": "x", "max_tokens": 1000, "ignore_eos": True, "flexgate": EXPERT}


class Project:
    """A project that may use math by an agreement of its own, with one key."""

    def __init__(self, http: Any) -> None:
        self.http = http
        self.id = self.write("POST", "/v1/organization/projects", {"name": "rights"})["id"]
        self.path = f"/v1/organization/projects/{self.id}"
        self.permit("math")
        account = self.write("POST", f"{self.path}/service_accounts", {"name": "robot"})["api_key"]
        self.key, self.key_id = account["value"], account["id"]

    def write(self, method: str, path: str, body: Any = None) -> Any:
        response = self.http.request(method, f"{path}?wait=all", json=body)
        assert response.status_code == 200, response.text
        return response.json()

    def permit(self, *experts: str) -> None:
        self.write("POST", f"{self.path}/expert_permissions", {"mode": "allow_list", "expert_ids": experts})

    def prohibit(self) -> None:
        ban = {"owner": "academy", "experts": ["math"], "assignee": f"tenant:{self.id}", "effect": "prohibit"}
        self.write("POST", "/v1/agreements", ban)


TAKEN: dict[str, tuple[Callable[[Project], Any], int, str]] = {
    "agreement": (Project.prohibit, 403, "expert_permission_ended"),
    "permission": (Project.permit, 403, "expert_permission_ended"),
    "key": (lambda p: p.write("DELETE", f"{p.path}/api_keys/{p.key_id}"), 401, "invalid_api_key"),
    "project": (lambda p: p.write("POST", f"{p.path}/archive"), 401, "invalid_api_key"),
}


@pytest.fixture
def project(server: Any) -> Iterator[Project]:
    with server.client("admin") as http:
        made = Project(http)
        yield made
        http.post(f"{made.path}/archive")


@pytest.mark.parametrize("taken", TAKEN)
def test_streams_end_with_the_right_they_live_on(server: Any, project: Project, taken: str) -> None:
    take, _, code = TAKEN[taken]
    events: list[tuple[float, str]] = []

    def read() -> None:
        headers = {"authorization": f"Bearer {project.key}"}
        body = {**BODY, "stream": True}
        with server.client("all") as http, http.stream("POST", "/v1/completions", json=body, headers=headers) as stream:
            events.extend((time.monotonic(), line) for line in stream.iter_lines() if line)

    reader = threading.Thread(target=read)
    reader.start()
    while len(events) < 5:
        assert reader.is_alive()
        time.sleep(0.005)
    take(project)
    answered = time.monotonic()
    reader.join(60)
    errors = [json.loads(line[6:])["error"]["code"] for _, line in events if line.startswith('data: {"error"')]
    tokens = [at for at, line in events if '"text"' in line]
    assert errors == [code]
    assert events[-1][1] == "data: [DONE]"
    assert 0 < len(tokens) < 1000
    assert max(tokens) < answered


@pytest.mark.parametrize("taken", TAKEN)
def test_answers_that_are_not_streamed_are_refused_with_the_same_reason(
    server: Any, project: Project, taken: str
) -> None:
    take, status, code = TAKEN[taken]
    answers: list[Any] = []

    def ask() -> None:
        with server.client("all") as http:
            headers = {"authorization": f"Bearer {project.key}"}
            answers.append(http.post("/v1/completions", json=BODY, headers=headers))

    asking = threading.Thread(target=ask)
    asking.start()
    while not running(server):
        assert asking.is_alive()
        time.sleep(0.005)
    take(project)
    asking.join(60)
    (answer,) = answers
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


def running(server: Any) -> bool:
    """Whether the engine works on a request."""
    with server.client("admin") as http:
        lines = http.get("/metrics").text.splitlines()
    return any(line.startswith("vllm:num_requests_running{") and not line.endswith(" 0.0") for line in lines)
