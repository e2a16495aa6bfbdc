"""`flexgate policy`: files are checked strictly, compared, applied whole, exported, simulated."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import yaml
from pydantic import TypeAdapter

from flexgate.policies.documents import Expert
from flexgate.policies.store import Store
from flexgate.policies.store.gitops import PolicyFile

Run = Callable[..., Any]
FORMAT = "format: flexgate-policy/v1\n"
PROPOSAL = FORMAT + "tenants:\n- {id: t, name: t, expert_ids: [math]}\n"


def test_an_export_applied_again_changes_nothing(flexgate: Run, policy_file: Run) -> None:
    exported = flexgate("policy", "export")
    assert exported.exit_code == 0
    content = yaml.safe_load(exported.output)
    assert [tenant["id"] for tenant in content["tenants"]] == ["t", "u"]
    assert content["hidden_experts"] == ["secret"]
    path = policy_file(exported.output)
    assert flexgate("policy", "check", path).exit_code == 0
    assert flexgate("policy", "diff", path, "--prune").exit_code == 0
    assert flexgate("policy", "simulate", path).exit_code == 0


def test_an_export_shows_what_the_policy_said_at_a_version(flexgate: Run, policy_file: Run, real_store: Store) -> None:
    before, version = flexgate("policy", "export").output, str(real_store.version())
    assert flexgate("policy", "apply", policy_file(PROPOSAL)).exit_code == 0
    assert flexgate("policy", "export").output != before
    assert flexgate("policy", "export", "--version", version).output == before
    missing = flexgate("policy", "export", "--version", "99")
    assert (missing.exit_code, missing.stderr) == (1, "flexgate: there is no policy version 99: the newest is 3\n")


def test_diff_and_dry_run_change_nothing_and_apply_does(flexgate: Run, policy_file: Run, real_store: Store) -> None:
    path, version = policy_file(PROPOSAL), real_store.version()
    found = flexgate("policy", "diff", path)
    assert found.exit_code == 3
    assert found.output.splitlines()[1].split() == ["change", "tenant", "t", "expert_ids"]
    assert flexgate("policy", "apply", path, "--dry-run").exit_code == 0
    assert real_store.version() == version
    applied = flexgate("policy", "apply", path, "--json")
    assert applied.exit_code == 0
    assert json.loads(applied.output)[0]["after"]["expert_ids"] == ["math"]
    assert real_store.version() == version + 1
    assert real_store.audit_log(after=real_store.audit_heads()[0].sequence - 1)[0].actor.startswith("cli:")
    assert flexgate("policy", "diff", path).exit_code == 0


def test_prune_archives_what_the_file_lacks(flexgate: Run, policy_file: Run) -> None:
    found = flexgate("policy", "diff", policy_file(PROPOSAL), "--prune", "--json")
    changes = {change["id"]: change for change in json.loads(found.output)}
    assert changes["u"]["after"]["archived"] is True
    assert changes["a-news"]["after"] is None


def test_an_expert_is_required_from_the_file_on_and_until_the_file_says_no_more(
    flexgate: Run, policy_file: Run, real_store: Store
) -> None:
    assert flexgate("policy", "apply", policy_file(FORMAT + "required_experts: [math]")).exit_code == 0
    assert real_store.snapshot().required == {"public", "math"}
    exported = flexgate("policy", "export").output
    assert yaml.safe_load(exported)["required_experts"] == ["math"]
    assert flexgate("policy", "apply", policy_file(FORMAT)).exit_code == 0
    assert real_store.snapshot().required == {"public", "math"}
    assert flexgate("policy", "apply", policy_file(FORMAT + "required_experts: []")).exit_code == 0
    assert real_store.snapshot().required == {"public"}


def test_a_rollback_says_what_it_would_change_and_is_done_once_confirmed(flexgate: Run, real_store: Store) -> None:
    version = real_store.version()
    refused = flexgate("policy", "rollback", "0")
    assert (refused.exit_code, real_store.version()) == (1, version)
    assert f"rolling back from policy version {version} to 0 would remove 3 agreements" in refused.stderr
    assert "archive 2 tenants ('t', 'u'): nothing was changed" in refused.stderr
    assert f"to do it, set 'confirm' to {version}, the current version" in refused.stderr
    assert flexgate("policy", "rollback", "0", "--confirm", str(version)).exit_code == 0
    assert all(tenant.archived for tenant in real_store.snapshot().tenants.values())


def test_explain_says_why_and_what_to_do(flexgate: Run) -> None:
    said = flexgate("policy", "explain", "t").output.splitlines()
    assert said[1].split() == ["public", "allowed", "unknown", "by", "anchor;", "required", "of", "every", "request"]
    assert said[2].split() == ["news", "allowed", "removed", "by", "agreement/a-news@1"]
    assert (
        "math    excluded  router   Expert 'math' is not on this project's allow list. Ask an administrator to add it."
        in said[3]
    )
    assert "secret" not in "".join(said)
    found = json.loads(flexgate("policy", "explain", "t", "--json").output)
    assert found["experts"][2]["reason"]["code"] == "not_in_allow_list"
    assert found["refusal"] is None


def test_explain_says_that_requests_would_leave_a_layer_without_an_expert(flexgate: Run, real_store: Store) -> None:
    with real_store.change(actor="test", at=2.0) as change:
        for expert in change.all(Expert):
            change.put(expert.model_copy(update={"empty_layers": frozenset({3})}))
    said = flexgate("policy", "explain", "t").output.splitlines()
    assert said[-1].startswith(
        "Requests are refused (layer_without_expert): The experts of this request leave a layer of the model without"
    )
    refused = json.loads(flexgate("policy", "explain", "t", "--json").output)["refusal"]
    assert refused["code"] == "layer_without_expert"


def test_simulate_says_who_gains_and_loses(flexgate: Run, policy_file: Run) -> None:
    found = flexgate("policy", "simulate", policy_file(PROPOSAL))
    assert found.exit_code == 3
    assert found.output.splitlines()[1].split() == ["t", "any", "purpose", "and", "region", "math", "news"]
    new = PROPOSAL + "- {id: v, name: v, mode: deny_list, purposes: [search]}\n"
    rows = json.loads(flexgate("policy", "simulate", policy_file(new), "--json").output)
    gained = {(row["project_id"], row["purpose"]): row["gained"] for row in rows}
    assert gained[("v", "search")] == ["public", "news", "math"]
    archived = FORMAT + "tenants:\n- {id: t, name: t, archived: true}\n"
    found = flexgate("policy", "simulate", policy_file(archived))
    assert "all requests refused" in found.output


def test_the_schema_is_json_schema_of_what_is_accepted(flexgate: Run) -> None:
    published = json.loads(flexgate("policy", "schema").output)
    assert published["additionalProperties"] is False
    assert {*PolicyFile.model_fields} == published["properties"].keys()
    assert published["$defs"]["Tenant"]["additionalProperties"] is False
    TypeAdapter(dict[str, Any]).validate_python(published)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "the file must be an object"),
        ("format: [", "while parsing"),
        ("format: flexgate-policy/v2", "'format' must be 'flexgate-policy/v1'"),
        (FORMAT + "tenant: []", "'tenant' is not a known field"),
        (FORMAT + "tenants: []\ntenants: []", "'tenants' is given twice"),
        (FORMAT + "tenants: &a []\nagreements: *a", "aliases are not supported: write the value out"),
        (FORMAT + "tenants: [{id: x, name: x}, {id: x, name: y}]", "'tenants': 'x' is given twice"),
        (FORMAT + "tenants: [{id: x, name: x, expert_ids: [zzz]}]", "project 'x' names the unknown expert 'zzz'"),
        (FORMAT + "tenants: !!python/object:os.system {}", "could not determine a constructor"),
        (FORMAT + "tenants: [{id: x, name: x, regions: [XX]}]", "project 'x': 'XX' is not a region"),
        (FORMAT + "tenants: [{id: x, name: x, regions: [DE-XX]}]", "project 'x': 'DE-XX' is not a region"),
        (FORMAT + "tenants: [{id: x, name: x, archived: yes}]", "'tenants[0].archived' must be true or false"),
        (
            FORMAT + "tenants: [{id: x, name: x, quota: {total_tokens: 1:30}}]",
            "quota.total_tokens' must be an integer",
        ),
        (
            FORMAT + "tenants: [{id: x, name: x, quota: {total_tokens: 1_000}}]",
            "quota.total_tokens' must be an integer",
        ),
        (FORMAT + "tenants: [{id: x, name: 2026-01-01, <<: {archived: true}}]", "'tenants[0].<<' is not a known field"),
        (FORMAT + "tenants: [{id: x, name: !!timestamp 2026-01-01}]", "could not determine a constructor"),
        (FORMAT + "? [a]\n: b", "a key must be a string"),
        (FORMAT + "required_experts: [zzz]", "required_experts names the unknown expert 'zzz'"),
        (FORMAT + "required_experts: [secret]", "'secret' is required in every answer"),
        ("\x00", "unacceptable character"),
    ],
)
def test_a_bad_file_is_one_sentence(
    flexgate: Run, policy_file: Run, real_store: Store, content: str, said: str
) -> None:
    version = real_store.version()
    for command in ("diff", "apply", "simulate"):
        found = flexgate("policy", command, policy_file(content))
        assert found.exit_code == 1
        assert said in found.stderr
        assert len(found.stderr.splitlines()) == 1
    assert real_store.version() == version


def test_yaml_does_not_turn_norway_into_false(flexgate: Run, policy_file: Run) -> None:
    path = policy_file(FORMAT + "tenants: [{id: t, name: t, expert_ids: [news, secret], regions: [NO, DE]}]")
    assert flexgate("policy", "apply", path).exit_code == 0
    assert "- 'NO'" in flexgate("policy", "export").output


@pytest.mark.parametrize("ends", ["20271231", "'20271231'", "2027-12-31", "1:30", "yes", "1.5"])
def test_a_prohibition_is_not_ended_by_a_word_that_is_no_time(
    flexgate: Run, policy_file: Run, real_store: Store, ends: str
) -> None:
    version = real_store.version()
    ban = "id: ban, owner: gazette, experts: [news], assignee: everyone, effect: prohibit"
    terms = f"{FORMAT}agreements: [{{{ban}, not_after: %s}}]"
    found = flexgate("policy", "apply", policy_file(terms % ends))
    assert (found.exit_code, real_store.version()) == (1, version)
    assert "'agreements[0].not_after': " in found.stderr
    assert "is not a time: write it as '2026-11-23T00:00:00Z'" in found.stderr
    assert flexgate("policy", "apply", policy_file(terms % "2027-12-31T00:00:00Z")).exit_code == 0
    assert real_store.snapshot().agreements["everyone"].limited["news"][-1].ends == 1830211200.0


@pytest.mark.parametrize(
    "name",
    ["yes", "NO", "~", "0o17", "0x1F", "017", "1e3", "1:30", "2026-01-01", ".inf", "true", "<<", "=", "1_000", "- a"],
)
def test_a_name_that_yaml_could_read_as_something_else_stays_a_name(
    flexgate: Run, policy_file: Run, real_store: Store, name: str
) -> None:
    content = {"format": "flexgate-policy/v1", "tenants": [{"id": "t", "name": name}]}
    assert flexgate("policy", "apply", policy_file(content)).exit_code == 0
    exported = flexgate("policy", "export").output
    assert flexgate("policy", "diff", policy_file(exported)).exit_code == 0
    assert real_store.snapshot().tenants["t"].name == name


def test_numbers_are_read_as_yaml_1_2_reads_them(flexgate: Run, policy_file: Run, real_store: Store) -> None:
    quota = "quota: {requests_per_minute: 017, tokens_per_minute: 0o17, concurrent_requests: 0x1F, total_tokens: ~}"
    path = policy_file(FORMAT + f"tenants: [{{id: t, name: t, {quota}}}]")
    assert flexgate("policy", "apply", path).exit_code == 0
    assert real_store.snapshot().tenants["t"].quota.model_dump() == {
        "requests_per_minute": 17,
        "tokens_per_minute": 15,
        "concurrent_requests": 31,
        "tokens_per_day": None,
        "tokens_per_month": None,
        "requests_per_day": None,
        "requests_per_month": None,
        "cost_per_day": None,
        "cost_per_month": None,
        "total_tokens": None,
    }


def test_a_file_may_come_through_a_pipe(flexgate: Run) -> None:
    assert flexgate("policy", "diff", "-", stdin=PROPOSAL).exit_code == 3


@pytest.mark.parametrize("arguments", [("policy", "explain", "zzz"), ("policy", "diff", "/nowhere.yaml")])
def test_what_does_not_exist_is_one_sentence(flexgate: Run, arguments: tuple[str, ...]) -> None:
    found = flexgate(*arguments)
    assert found.exit_code == 1
    assert len(found.stderr.splitlines()) == 1
