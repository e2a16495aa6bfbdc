"""What the `openai` package's own admin client does, here without an engine."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from flexgate.policies.store import Store

pytestmark = pytest.mark.asyncio


async def test_projects_are_created_shown_renamed_listed_and_archived(admin: Any) -> None:
    project = await admin.projects.create(name="Acme")
    assert project.id.startswith("proj_")
    assert (project.name, project.status, project.archived_at) == ("Acme", "active", None)
    assert (await admin.projects.update(project.id, name="Acme 2")).name == "Acme 2"
    shown = await admin.projects.retrieve(project.id)
    assert (shown.name, shown.created_at) == ("Acme 2", project.created_at)
    assert [p.id async for p in admin.projects.list()] == ["t", "u", project.id]
    archived = await admin.projects.archive(project.id)
    assert archived.status == "archived"
    assert archived.archived_at >= project.created_at
    assert [p.id async for p in admin.projects.list()] == ["t", "u"]
    assert [p.id async for p in admin.projects.list(include_archived=True)] == ["t", "u", project.id]
    with pytest.raises(openai.BadRequestError, match="archived"):
        await admin.projects.update(project.id, name="again")


async def test_lists_come_in_pages(admin: Any) -> None:
    made = [(await admin.projects.create(name=f"p{n}")).id for n in range(5)]
    first = await admin.projects.list(limit=3)
    assert (len(first.data), first.has_more) == (3, True)
    assert [p.id async for p in admin.projects.list(limit=3)] == ["t", "u", *made]
    with pytest.raises(openai.BadRequestError, match="'after' is not the id of an object"):
        await admin.projects.list(after="proj_nonsense")
    with pytest.raises(openai.BadRequestError, match="limit"):
        await admin.projects.list(limit=0)


async def test_a_service_account_brings_a_key_that_is_shown_once(admin: Any, real_store: Store) -> None:
    accounts = admin.projects.service_accounts
    made = await accounts.create("t", name="robot", expires_in_seconds=3600)
    assert made.api_key.value.startswith("sk-")
    assert made.api_key.expires_at == made.api_key.created_at + 3600
    assert [a.name async for a in accounts.list("t")][-1] == "robot"
    assert (await accounts.retrieve(made.id, project_id="t")).name == "robot"
    keys = [key async for key in admin.projects.api_keys.list("t")]
    assert keys[-1].id == made.api_key.id
    assert keys[-1].owner.service_account.id == made.id
    shown = await admin.projects.api_keys.retrieve(made.api_key.id, project_id="t")
    assert shown.redacted_value == made.api_key.value[:12] + "..."
    assert made.api_key.value not in shown.to_json()
    assert (await accounts.delete(made.id, project_id="t")).deleted
    assert made.id not in [a.id async for a in accounts.list("t")]
    revoked = {key.key_id: key.revoked for key in real_store.keys()}
    assert revoked[made.api_key.id] is not None
    with pytest.raises(openai.NotFoundError):
        await accounts.delete(made.id, project_id="t")


async def test_two_keys_live_while_one_is_rotated(admin: Any) -> None:
    old = await admin.projects.service_accounts.create("t", name="old")
    new = await admin.projects.service_accounts.create("t", name="new")
    live = [key.id async for key in admin.projects.api_keys.list("t")]
    assert {old.api_key.id, new.api_key.id} <= set(live)
    assert (await admin.projects.api_keys.delete(old.api_key.id, project_id="t")).deleted
    live = [key.id async for key in admin.projects.api_keys.list("t")]
    assert new.api_key.id in live
    assert old.api_key.id not in live


async def test_admin_keys(admin: Any) -> None:
    made = await admin.admin_api_keys.create(name="second", expires_in_seconds=60)
    assert made.value.startswith("sk-")
    listed = [key async for key in admin.admin_api_keys.list(limit=2)]
    assert sorted(key.owner.role for key in listed) == ["admin", "admin", "auditor", "owner"]
    first = next(key for key in listed if key.owner.role == "admin" and key.id != made.id)
    newest = [key.id async for key in admin.admin_api_keys.list(order="desc", limit=1)]
    assert newest[0] == made.id
    assert made.value not in (await admin.admin_api_keys.retrieve(made.id)).to_json()
    assert (await admin.admin_api_keys.delete(made.id)).deleted
    with pytest.raises(openai.BadRequestError, match="only admin key"):
        await admin.admin_api_keys.delete(first.id)


async def test_rate_limits_of_a_project_and_of_its_keys(admin: Any) -> None:
    limits = admin.projects.rate_limits
    key = (await admin.projects.service_accounts.create("u", name="robot")).api_key
    assert (await limits.list_rate_limits("u")).data[0].id == "rl-project"
    changed = await limits.update_rate_limit("rl-project", project_id="u", max_requests_per_1_minute=7)
    assert (changed.max_requests_per_1_minute, changed.model) == (7, "tiny")
    await limits.update_rate_limit("rl-project", project_id="u", max_tokens_per_1_minute=500)
    await limits.update_rate_limit(f"rl-{key.id}", project_id="u", max_requests_per_1_minute=2)
    by_id = {limit.id: limit async for limit in limits.list_rate_limits("u")}
    assert by_id["rl-project"].max_requests_per_1_minute == 7
    assert by_id["rl-project"].max_tokens_per_1_minute == 500
    assert by_id[f"rl-{key.id}"].max_requests_per_1_minute == 2
    for id_ in ("rl-key_nonsense", "rl-", "nonsense"):
        with pytest.raises(openai.NotFoundError):
            await limits.update_rate_limit(id_, project_id="u", max_requests_per_1_minute=1)
    with pytest.raises(openai.BadRequestError, match="max_images_per_1_minute"):
        await limits.update_rate_limit("rl-project", project_id="u", max_images_per_1_minute=1)


async def test_audit_logs_name_who_did_what(admin: Any) -> None:
    project = await admin.projects.create(name="Acme")
    account = await admin.projects.service_accounts.create(project.id, name="robot")
    await admin.projects.api_keys.delete(account.api_key.id, project_id=project.id)
    await admin.projects.archive(project.id)
    logs = [log async for log in admin.audit_logs.list(project_ids=[project.id], limit=2)]
    assert [log.type for log in logs] == ["project.archived", "api_key.deleted", "api_key.created", "project.created"]
    assert len({log.actor.api_key.id for log in logs}) == 1
    assert logs[-1].project_created.id == project.id
    assert all(log.project.id == project.id for log in logs)
    only = [log async for log in admin.audit_logs.list(event_types=["project.archived"])]
    assert [log.id for log in only] == [logs[0].id]
    assert [log async for log in admin.audit_logs.list(effective_at={"gt": logs[0].effective_at})] == []
    assert [log async for log in admin.audit_logs.list(actor_ids=["nobody"])] == []
    assert account.api_key.value not in "".join([log.to_json() async for log in admin.audit_logs.list()])
    former = await admin.audit_logs.list(before=logs[3].id, limit=2)
    assert [log.id for log in former.data] == [logs[1].id, logs[2].id]
    assert former.has_more


async def test_a_request_that_is_denied_is_in_the_audit_log(admin: Any, call: Any, services: Any) -> None:
    body = {"prompt": "a secret prompt", "flexgate": {"experts": {"only": ["math"]}}}
    for _ in range(3):
        assert (await call("sk-t", "POST", "/v1/completions", json=body)).status_code == 403
    assert (await call("sk-nobody", "GET", "/v1/experts")).status_code == 401
    services.denials.flush()
    logs = [log async for log in admin.audit_logs.list(event_types=["request.denied"])]
    said = {log.model_extra["flexgate"]["detail"]["code"]: log.model_extra["flexgate"] for log in logs}
    denied, unknown = said["expert_policy_denied"], said["invalid_api_key"]
    assert denied["detail"]["requests"] == 3
    assert denied["detail"]["tenant_id"] == "t"
    assert denied["detail"]["rules"] == [["math", "not_in_allow_list", "project/allow_list"]]
    assert unknown["detail"]["route"] == "/v1/experts"
    assert "secret prompt" not in str(said)
    assert "sk-nobody" not in str(said)
