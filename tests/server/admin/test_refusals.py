"""Every refusal of the administration, word for word: `golden/admin_refusals.json` is reviewed.

`FLEXGATE_WRITE_GOLDEN=1` writes what the server says now; the difference is then the review.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

GOLDEN = Path(__file__).parents[1] / "golden" / "admin_refusals.json"
ALL = "/v1/organization/projects"
PERMISSIONS = f"{ALL}/t/expert_permissions"
TERMS = {"owner": "academy", "experts": ["math"], "assignee": "everyone", "effect": "permit"}
FILE = {"format": "flexgate-policy/v1"}

# name → (key, method, path, body)
CASES: dict[str, tuple[str | None, str, str, Any]] = {
    "no key": (None, "GET", ALL, None),
    "tenant key administers": ("sk-t", "POST", ALL, {"name": "x"}),
    "auditor key writes": ("sk-auditor", "POST", ALL, {"name": "x"}),
    "owner key lists projects": ("sk-owner", "GET", ALL, None),
    "another tenant's project": ("sk-t", "GET", f"{ALL}/u", None),
    "project without name": ("sk-admin", "POST", ALL, {}),
    "empty name": ("sk-admin", "POST", ALL, {"name": ""}),
    "name with control characters": ("sk-admin", "POST", ALL, {"name": "a\x00b"}),
    "unknown project field": ("sk-admin", "POST", ALL, {"name": "x", "geography": "EU"}),
    "unknown own field": ("sk-admin", "POST", ALL, {"name": "x", "flexgate": {"admin": True}}),
    "unknown purpose": ("sk-admin", "POST", ALL, {"name": "x", "flexgate": {"purposes": ["fun"]}}),
    "unknown parameter": ("sk-admin", "GET", f"{ALL}?sort=name", None),
    "strange parameter": ("sk-admin", "GET", f"{ALL}?A%00=1", None),
    "parameter twice": ("sk-admin", "GET", f"{ALL}?limit=1&limit=2", None),
    "limit as text": ("sk-admin", "GET", f"{ALL}?limit=many", None),
    "limit over 100": ("sk-admin", "GET", f"{ALL}?limit=101", None),
    "unknown cursor": ("sk-admin", "GET", f"{ALL}?after=nonsense", None),
    "unknown wait": ("sk-admin", "POST", f"{ALL}?wait=some", {"name": "x"}),
    "unknown mode": ("sk-admin", "POST", PERMISSIONS, {"mode": "open", "expert_ids": []}),
    "no mode": ("sk-admin", "POST", PERMISSIONS, {"expert_ids": []}),
    "unknown expert": ("sk-admin", "POST", PERMISSIONS, {"mode": "allow_list", "expert_ids": ["zzz"]}),
    "no expert id": ("sk-admin", "POST", PERMISSIONS, {"mode": "allow_list", "expert_ids": ["A B"]}),
    "public on a list": ("sk-admin", "POST", PERMISSIONS, {"mode": "deny_list", "expert_ids": ["public"]}),
    "key that ends at once": (
        "sk-admin",
        "POST",
        f"{ALL}/t/service_accounts",
        {"name": "x", "expires_in_seconds": 0},
    ),
    "account without key": (
        "sk-admin",
        "POST",
        f"{ALL}/t/service_accounts",
        {"name": "x", "create_service_account_only": True},
    ),
    "admin key of a tenant": ("sk-admin", "POST", "/v1/organization/admin_api_keys", {"name": "x", "role": "tenant"}),
    "owner key without owner": ("sk-admin", "POST", "/v1/organization/admin_api_keys", {"name": "x", "role": "owner"}),
    "negative limit": ("sk-admin", "POST", f"{ALL}/t/rate_limits/rl-project", {"max_requests_per_1_minute": -1}),
    "image limit": ("sk-admin", "POST", f"{ALL}/t/rate_limits/rl-project", {"max_images_per_1_minute": 1}),
    "agreement without experts": ("sk-admin", "POST", "/v1/agreements", {**TERMS, "experts": []}),
    "agreement of someone else's expert": (
        "sk-admin",
        "POST",
        "/v1/agreements",
        {**TERMS, "id": "n", "experts": ["news"]},
    ),
    "agreement for an unknown tenant": (
        "sk-admin",
        "POST",
        "/v1/agreements",
        {**TERMS, "id": "n", "assignee": "tenant:zzz"},
    ),
    "agreement with an unknown field": ("sk-admin", "POST", "/v1/agreements", {**TERMS, "unless": "raining"}),
    "agreement that ends before it starts": (
        "sk-admin",
        "POST",
        "/v1/agreements",
        {**TERMS, "not_before": "2027-01-01T00:00:00Z", "not_after": "2026-01-01T00:00:00Z"},
    ),
    "time without a zone": ("sk-admin", "POST", "/v1/agreements", {**TERMS, "not_after": "2027-01-01T00:00:00"}),
    "time before all time": (
        "sk-admin",
        "POST",
        "/v1/agreements",
        {**TERMS, "not_before": "0001-01-01T00:00:00+14:00"},
    ),
    "taken id": ("sk-admin", "POST", "/v1/agreements", {**TERMS, "id": "a-math"}),
    "owner chooses an id": ("sk-owner", "POST", "/v1/agreements", {**TERMS, "experts": ["news"], "id": "mine"}),
    "agreement changes owner": ("sk-admin", "POST", "/v1/agreements/a-news", TERMS),
    "explain nobody": ("sk-admin", "GET", "/v1/policy/explain", None),
    "explain nonsense": ("sk-admin", "GET", "/v1/policy/explain?project_id=zzz", None),
    "explain an unregistered purpose": ("sk-t", "GET", "/v1/policy/explain?purpose=search", None),
    "simulate nothing": ("sk-admin", "POST", "/v1/policy/simulate", {}),
    "simulate another format": ("sk-admin", "POST", "/v1/policy/simulate", {"policy": {"format": "v2"}}),
    "simulate an unknown expert": (
        "sk-admin",
        "POST",
        "/v1/policy/simulate",
        {"policy": {**FILE, "tenants": [{"id": "t", "name": "t", "expert_ids": ["zzz"]}]}},
    ),
    "roll back to the future": ("sk-admin", "POST", "/v1/policy/rollback", {"version": 99}),
    "compare with the future": ("sk-admin", "GET", "/v1/policy/diff?old=1&new=99", None),
    "compare half": ("sk-admin", "GET", "/v1/policy/diff?old=1", None),
    "audit from nowhere": ("sk-auditor", "GET", "/v1/organization/audit_logs?after=7", None),
    "audit at no time": ("sk-auditor", "GET", "/v1/organization/audit_logs?effective_at[gt]=now", None),
}


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    if os.environ.get("FLEXGATE_WRITE_GOLDEN"):
        return {}
    said: dict[str, Any] = json.loads(GOLDEN.read_text())
    return said


@pytest.mark.asyncio
@pytest.mark.parametrize("name", CASES)
async def test_refusal_says_exactly_this(call: Any, real_store: Any, golden: dict[str, Any], name: str) -> None:
    key, method, path, body = CASES[name]
    version = real_store.version()
    response = await call(key, method, path, json=body)
    assert real_store.version() == version, "a refused change was made"
    said = {"status": response.status_code, "body": response.json()}
    if os.environ.get("FLEXGATE_WRITE_GOLDEN"):
        golden[name] = said
        GOLDEN.write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n")
        return
    assert said == golden[name]
    assert said["status"] in (400, 401, 403, 404)


def test_the_golden_file_has_exactly_these_cases(golden: dict[str, Any]) -> None:
    assert set(golden) == set(CASES) or os.environ.get("FLEXGATE_WRITE_GOLDEN")


def test_every_refusal_has_the_one_shape(golden: dict[str, Any]) -> None:
    for name, said in golden.items():
        assert said["body"].keys() == {"error"}, name
        assert said["body"]["error"].keys() == {"message", "type", "param", "code"}, name
        assert said["body"]["error"]["message"].endswith("."), name
