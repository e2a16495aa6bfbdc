"""Documents that contradict themselves or name what is not there, at every door.

Wherever they come in, they are refused in words that say where and what would be right, and the policy and the
audit log are what they were before.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from policy_file import refusal, run

from flexgate.policies.decide import decide
from flexgate.policies.decision import DecisionRequest
from flexgate.policies.errors import ChangeRefused
from flexgate.policies.store import Store, gitops

MATH = {"id": "n", "owner": "academy", "experts": ["math"], "assignee": "everyone", "effect": "permit"}
T = {"id": "t", "name": "t"}
PERMISSIONS = "/v1/organization/projects/t/expert_permissions"
AGREEMENTS = "/v1/agreements"
THERE_ARE = "use one of math, news, secret"


class Bad(NamedTuple):
    """One mistake in a policy file and in a request, and what each is told."""

    file: dict[str, Any]
    said: str
    request: tuple[str, dict[str, Any]] | None = None
    answered: str | None = None


def _agreement(said: str, answered: str | None = None, **terms: Any) -> Bad:
    return Bad({"agreements": [{**MATH, **terms}]}, said, (AGREEMENTS, {**MATH, **terms}), answered)


DOCUMENTS = {
    "agreement twice": Bad(
        {"agreements": [MATH, {**MATH, "effect": "prohibit"}]},
        "'agreements': 'n' is given twice",
        (AGREEMENTS, {**MATH, "id": "a-math", "effect": "prohibit"}),
        "The id 'a-math' is taken: choose another one.",
    ),
    "another agreement under a version": Bad(
        {"agreements": [{**MATH, "id": "a-math", "effect": "prohibit"}]},
        "agreement 'a-math' was stored as version 1: a changed agreement needs version 2 or a higher one",
        (f"{AGREEMENTS}/a-math", {**MATH, "id": "a-math", "effect": "prohibit", "version": 1}),
        "Agreement 'a-math' would get version 2, not 1.",
    ),
    "agreement of someone else's expert": _agreement(
        "agreement 'n' of owner 'academy' names 'news', which belongs to 'gazette': name the owner's own experts only",
        experts=["news"],
    ),
    "agreement of an unknown expert": _agreement(
        "agreement 'n' names the unknown expert 'zzz': use one of math", experts=["zzz"]
    ),
    "agreement of an unknown set": _agreement(
        "agreement 'n' names the unknown set 'set:zzz': there is none yet", experts=["set:zzz"]
    ),
    "agreement for an unknown tenant": _agreement(
        "agreement 'n' names the unknown project 'zzz': create it first", assignee="tenant:zzz"
    ),
    "an end before the start": _agreement(
        "'agreements[0]': 'not_after' must be later than 'not_before'",
        "'not_after' must be later than 'not_before'.",
        not_before="2027-01-01T00:00:00Z",
        not_after="2026-01-01T00:00:00Z",
    ),
    "tenant with an unknown expert": Bad(
        {"tenants": [{**T, "expert_ids": ["zzz"]}]},
        f"project 't' names the unknown expert 'zzz': {THERE_ARE}",
        (PERMISSIONS, {"mode": "deny_list", "expert_ids": ["zzz"]}),
    ),
    "set with an unknown expert": Bad(
        {"expert_sets": [{"id": "set:s", "experts": ["zzz"]}]},
        f"set 'set:s' names the unknown expert 'zzz': {THERE_ARE}",
    ),
    "unknown expert hidden": Bad(
        {"hidden_experts": ["zzz"]}, f"hidden_experts names the unknown expert 'zzz': {THERE_ARE}"
    ),
}


@pytest.fixture
def unchanged(real_store: Store) -> Iterator[None]:
    """Nothing of the store is another at the end."""
    before = real_store.snapshot(), real_store.audit_heads()
    yield
    assert (real_store.snapshot(), real_store.verify_audit().heads) == before


def _content(bad: Bad) -> dict[str, Any]:
    return {"format": "flexgate-policy/v1", **bad.file}


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("bad", DOCUMENTS.values(), ids=DOCUMENTS)
def test_a_bad_document_is_refused_by_the_store(real_store: Store, bad: Bad) -> None:
    with pytest.raises(ChangeRefused) as refused:
        gitops.apply(real_store, gitops.parse_file(_content(bad)), actor="test", at=9.0)
    assert str(refused.value) == bad.said


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("bad", DOCUMENTS.values(), ids=DOCUMENTS)
def test_a_bad_document_is_refused_in_a_file(real_store: Store, tmp_path: Path, bad: Bad) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(json.dumps(_content(bad)))
    for command in ("apply", "diff", "simulate"):
        found = run("policy", command, str(path), f"--database-url={real_store.engine.url}")
        assert refusal(found).endswith(bad.said)


@pytest.mark.asyncio
@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("name", [name for name, bad in DOCUMENTS.items() if bad.request])
async def test_a_bad_document_is_refused_over_http(make_client: Any, name: str) -> None:
    bad = DOCUMENTS[name]
    assert bad.request is not None
    async with make_client("sk-admin") as http:
        path, body = bad.request
        answer = await http.post(path, json=body)
        simulated = await http.post("/v1/policy/simulate", json={"policy": _content(bad)})
    assert (answer.status_code, simulated.status_code) == (400, 400)
    said = bad.answered or f"{bad.said[:1].upper()}{bad.said[1:]}."
    assert answer.json()["error"]["message"] == said


@pytest.mark.asyncio
async def test_of_contradicting_agreements_the_prohibition_holds_at_every_door(
    real_store: Store, make_client: Any, tmp_path: Path
) -> None:
    def allowed() -> tuple[str, ...]:
        return decide(real_store.snapshot(), "u", DecisionRequest(decision_id="d"), time.time()).allowed

    path = tmp_path / "policy.yaml"
    path.write_text(json.dumps({"format": "flexgate-policy/v1", "agreements": [{**MATH, "effect": "prohibit"}]}))
    assert "math" in allowed()
    assert run("policy", "apply", str(path), f"--database-url={real_store.engine.url}").exit_code == 0
    assert "math" not in allowed()
    async with make_client("sk-admin") as http:
        assert (await http.post(AGREEMENTS, json={**MATH, "id": "again"})).status_code == 200
        assert "math" not in allowed()
        assert (await http.delete(f"{AGREEMENTS}/n")).status_code == 200
        assert "math" in allowed()
        body = {**MATH, "id": "never", "effect": "prohibit"}
        assert (await http.post(AGREEMENTS, json=body)).status_code == 200
    assert "math" not in allowed()
