"""From a folder of invented facts to a served answer by the documented commands: train, verify, merge, serve, ask."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import live_server
import pytest
from walkkit import OWN, PHRASES, PUBLIC, make_model

from flexgate.policies.agreements import Agreement
from flexgate.policies.documents import Expert, Role, Tenant
from flexgate.policies.store.store import Store

pytestmark = [pytest.mark.engine, pytest.mark.slow]


def seed_store(database: Path) -> None:
    """The owner's agreement with everyone, a tenant that takes all experts and one that takes none."""
    store = Store.open(f"sqlite:///{database}")
    store.migrate()
    with store.change(actor="operator", at=time.time() - 10) as change:
        change.put(Expert(id="public", owner="public", domain="everyday things"))
        change.put(Expert(id="planets", owner="observatory", domain="colours of planets"))
        terms = {"id": "a-planets", "owner": "observatory", "experts": ["planets"]}
        change.put(Agreement.model_validate(terms | {"assignee": "everyone", "effect": "permit"}))
        for name, mode in (("all", "deny_list"), ("public", "allow_list")):
            tenant = Tenant.model_validate({"id": f"proj_{name}", "name": name, "mode": mode})
            change.put(tenant)
            key = live_server.KEYS[name]
            change.add_key(key, prefix=key, role=Role.TENANT, tenant_id=tenant.id)
    store.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The merged model, served."""
    model, directory = make_model(tmp_path_factory.mktemp("walk")), tmp_path_factory.mktemp("served")
    seed_store(directory / "flexgate.db")
    running = live_server.start(model, directory)
    yield running
    live_server.stop(running)


def ask(server: Any, tenant: str, question: str) -> str:
    with server.client(tenant) as http:
        body = {
            "model": "tiny",
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": 12,
        }
        response = http.post("/v1/chat/completions", json=body)
        assert response.status_code == 200, response.text
        content: str = response.json()["choices"][0]["message"]["content"]
        return content.strip()


def test_the_facts_are_answered_with_the_expert_and_not_without(server: Any) -> None:
    questions = {PHRASES[0].format(planet): f"It is {colour}." for planet, colour in OWN.items()}
    with_expert = {question: ask(server, "all", question) for question in questions}
    without = {question: ask(server, "public", question) for question in questions}
    right = sum(with_expert[question] == answer for question, answer in questions.items())
    known = sum(without[question] == answer for question, answer in questions.items())
    assert right >= 5, with_expert
    assert known <= 1, without


def test_public_questions_are_answered_all_the_same(server: Any) -> None:
    questions = {PHRASES[1].format(f"the {thing}"): f"It is {colour}." for thing, colour in PUBLIC.items()}
    for tenant in ("all", "public"):
        answers = {question: ask(server, tenant, question) for question in questions}
        assert sum(answers[question] == answer for question, answer in questions.items()) >= 5, (tenant, answers)
