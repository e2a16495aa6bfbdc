"""What administers does the same on the database and on a running server by URL and key."""

from __future__ import annotations

import asyncio
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer
from typer.testing import CliRunner, Result

from flexgate.experts.cli.api import Api
from flexgate.experts.errors import ServerRefused
from flexgate.policies.audit import DENIED, Event
from flexgate.policies.store import Store
from flexgate.server.cli.main import SUBCOMMANDS, app
from flexgate.server.cli.server_target import ServerTarget
from flexgate.server.http.auth import KeyRevoked, authenticate
from flexgate.server.policy.replicas import Replicas
from flexgate.server.policy.source import PolicySource

Run = Callable[..., Result]
EVERY_GROUP = [
    ["tenants", "list"],
    ["admin-keys", "list"],
    ["agreements", "list"],
    ["sets", "list"],
    ["policy", "export"],
    ["audit", "verify"],
]
TERMS = {"id": "a-new", "owner": "academy", "experts": ["math"], "assignee": "tenant:t", "effect": "permit"}


@pytest.fixture
def services(services: Any, real_store: Store) -> Any:
    """Decisions come from the store that the administration writes to."""
    replicas = Replicas(real_store.engine, lease_s=2.0)
    live = dict.fromkeys(("public", "news", "math", "secret"), 1)
    services.policy = PolicySource(real_store, lambda: live, lease_s=2.0, poll_s=0.01, replicas=replicas)
    services.policy.confirm()
    return services


def on(options: list[str]) -> Run:
    def run(*words: str, stdin: str | None = None) -> Result:
        return CliRunner().invoke(app, [*words, *options], input=stdin)

    return run


def ok(result: Result) -> str:
    assert result.exit_code == 0, result.output
    return result.output


def administer(run: Run, store: Store, folder: Path) -> None:
    """A tenant's life, limits, agreements and the audit log; the same whatever `run` acts on."""
    project = ok(run("tenants", "create", "Acme [x]")).strip()
    ok(run("tenants", "set-experts", project, "news", "math"))
    assert ok(run("tenants", "set-experts", project, "--remove", "news", "--add", "secret")) == (
        "allow_list: math, secret\n"
    )
    assert ok(run("tenants", "set-experts", project, "--add", "news", "--remove", "secret")) == (
        "allow_list: math, news\n"
    )
    assert store.snapshot().tenants[project].named == {"news", "math"}
    row = next(line for line in ok(run("tenants", "list")).splitlines() if line.startswith(project))
    assert row.split() == [project, "Acme", "[x]", "allow_list", "math,", "news"]
    secret = ok(run("tenants", "create-key", project, "robot", "--expires-in-days", "30")).strip()
    assert authenticate(store.snapshot(), f"Bearer {secret}", 5.0).tenant_id == project
    shown = json.loads(ok(run("tenants", "show", project)))
    assert (shown["name"], shown["mode"], sorted(shown["expert_ids"])) == ("Acme [x]", "allow_list", ["math", "news"])
    (key,) = shown["keys"]
    assert (key["name"], secret in json.dumps(shown)) == ("robot", False)

    ok(run("tenants", "set-limits", project, "--requests-per-minute", "5", "--total-tokens", "900"))
    ok(run("tenants", "set-limits", project, "--of-key", key["id"], "--concurrent-requests", "2"))
    ok(run("tenants", "set-limits", project, "--total-tokens", "-1"))
    nothing = dict.fromkeys(
        [
            "requests_per_minute",
            "tokens_per_minute",
            "concurrent_requests",
            "tokens_per_day",
            "tokens_per_month",
            "requests_per_day",
            "requests_per_month",
            "cost_per_day",
            "cost_per_month",
            "total_tokens",
        ]
    )
    assert json.loads(ok(run("tenants", "limits", project, "--json"))) == {
        "project": nothing | {"requests_per_minute": 5},
        key["id"]: nothing | {"concurrent_requests": 2},
    }
    shown = [line.split() for line in ok(run("tenants", "limits", project)).splitlines()]
    assert shown[1:] == [["project", "5", *["none"] * 9], [key["id"], "none", "none", "2", *["none"] * 7]]
    ok(run("tenants", "set-limits", project, "--cost-per-month", "12.50 EUR", "--requests-per-day", "7"))
    budget = json.loads(ok(run("tenants", "limits", project, "--json")))["project"]
    assert (budget["cost_per_month"], budget["requests_per_day"]) == ({"amount": "12.50", "currency": "EUR"}, 7)
    assert " 12.50 EUR " in ok(run("tenants", "limits", project))
    for cost, words in (("12.50", "such as '100 EUR'"), ("1 XXZ", "not a currency"), ("x EUR", "must be a number")):
        refused = run("tenants", "set-limits", project, "--cost-per-month", cost)
        assert refused.exit_code != 0
        assert words in refused.output + refused.stderr, refused
    refused = run("tenants", "set-limits", project, "--cost-per-day", "1 USD")
    assert refused.exit_code == 1
    assert "use one currency for both" in refused.stderr
    ok(run("tenants", "set-limits", project, "--cost-per-month", "-1", "--requests-per-day", "-1"))
    assert json.loads(ok(run("tenants", "limits", project, "--json")))["project"] == nothing | {
        "requests_per_minute": 5
    }

    assert ok(run("agreements", "create", "-", stdin=json.dumps(TERMS))) == "a-new\n"
    (folder / "terms.json").write_text(json.dumps(TERMS | {"experts": ["math", "set:none"]}))
    refused = run("agreements", "revise", "a-new", str(folder / "terms.json"))
    assert refused.exit_code == 1
    assert "set:none" in refused.stderr
    (folder / "terms.json").write_text(json.dumps(TERMS | {"assignee": "everyone"}))
    assert ok(run("agreements", "revise", "a-new", str(folder / "terms.json"))) == "2\n"
    row = next(line for line in ok(run("agreements", "list")).splitlines() if line.startswith("a-new "))
    assert row.split() == ["a-new", "2", "academy", "math", "everyone", "permit"]
    assert json.loads(ok(run("agreements", "show", "a-new")))["assignee"] == "everyone"
    ok(run("agreements", "terminate", "a-new"))
    assert run("agreements", "show", "a-new").exit_code == 1

    ok(run("sets", "create", "set:science", "math"))
    assert run("sets", "create", "set:science", "news").exit_code == 1
    ok(run("sets", "change", "set:science", "math", "news"))
    assert ok(run("sets", "list")).splitlines()[1].split() == ["set:science", "math,", "news"]
    ok(run("tenants", "set-experts", project, "set:science"))
    refused = run("sets", "delete", "set:science")
    assert (refused.exit_code, f"roject '{project}' still names 'set:science'" in refused.stderr) == (1, True)
    ok(run("tenants", "set-experts", project, "--none"))
    ok(run("sets", "delete", "set:science"))
    assert ok(run("sets", "list")) == "no sets\n"

    ok(run("tenants", "revoke-key", project, key["id"]))
    with pytest.raises(KeyRevoked):
        authenticate(store.snapshot(), f"Bearer {secret}", 9e9)
    ok(run("tenants", "archive", project))
    assert project not in ok(run("tenants", "list"))
    assert f"{project}  Acme [x] (archived)" in ok(run("tenants", "list", "--archived"))

    version = store.version()
    exported = ok(run("policy", "export"))
    (folder / "policy.yaml").write_text(exported.replace("name: u", "name: renamed"))
    changed = run("policy", "diff", str(folder / "policy.yaml"))
    assert (changed.exit_code, changed.output.splitlines()[1].split()) == (3, ["change", "tenant", "u", "name"])
    assert run("policy", "apply", str(folder / "policy.yaml"), "--dry-run").output == changed.output
    assert store.version() == version
    assert ok(run("policy", "apply", str(folder / "policy.yaml"))) == changed.output
    assert ok(run("policy", "export", "--version", str(version))) == exported
    assert "olling back from policy version" in run("policy", "rollback", str(version)).stderr
    assert ok(run("policy", "rollback", str(version), "--confirm", str(version + 1))) == f"{version + 2}\n"
    assert ok(run("policy", "export")) == exported
    said = [line.split()[:2] for line in ok(run("policy", "explain", "u")).splitlines()[1:]]
    assert said[:2] == [["public", "allowed"], ["news", "allowed"]]
    (folder / "policy.yaml").write_text("format: flexgate-policy/v1\ntenants: [{id: u, name: u, expert_ids: [math]}]\n")
    simulated = run("policy", "simulate", str(folder / "policy.yaml"))
    assert simulated.exit_code == 3
    assert ["u", "any", "purpose", "and", "region", "news"] in [line.split() for line in simulated.output.splitlines()]
    assert run("policy", "diff", "-", stdin="format: [").exit_code == 1

    secret = ok(run("admin-keys", "create", "watcher", "--role", "auditor", "--expires-in-days", "1")).strip()
    assert authenticate(store.snapshot(), f"Bearer {secret}", 5.0).role == "auditor"
    (row,) = [line.split() for line in ok(run("admin-keys", "list")).splitlines() if " watcher " in line]
    assert row[1:3] == ["watcher", "auditor"]
    ok(run("admin-keys", "revoke", row[0]))
    with pytest.raises(KeyRevoked):
        authenticate(store.snapshot(), f"Bearer {secret}", 5.0)
    assert run("admin-keys", "create", "no owner", "--role", "owner").exit_code == 1
    ok(run("admin-keys", "create", "gazette's", "--role", "owner", "--owner", "gazette"))
    assert [key["owner"]["id"] for key in json.loads(ok(run("admin-keys", "list", "--json")))][-1] == "gazette"

    head = ok(run("audit", "head"))
    (folder / "heads.jsonl").write_text(head)
    sequence = json.loads(head)["sequence"]
    said = f"OK: the hash chain of {sequence} entries is intact; it contains 1 of 1 given heads\n"
    assert ok(run("audit", "verify", "--heads", str(folder / "heads.jsonl"))) == said
    lines = ok(run("audit", "export", "--after", str(sequence - 2))).splitlines()
    assert [json.loads(line)["sequence"] for line in lines] == [sequence - 1, sequence]
    (folder / "log.jsonl").write_text(ok(run("audit", "export")))
    assert CliRunner().invoke(app, ["audit", "verify", "--file", str(folder / "log.jsonl")]).exit_code == 0
    assert run("sets", "change", "set:science", "math").exit_code == 1


def test_the_database_is_administered(real_store: Store, tmp_path: Path) -> None:
    administer(on(["--database-url", real_store.engine.url.render_as_string()]), real_store, tmp_path)


@pytest.mark.asyncio
async def test_a_running_server_is_administered_by_url_and_key(
    urls: tuple[str, str], real_store: Store, tmp_path: Path
) -> None:
    run = on(["--url", urls[1], "--key", "sk-admin"])
    await asyncio.to_thread(administer, run, real_store, tmp_path)


@pytest.mark.asyncio
async def test_a_server_refuses_in_its_own_words(urls: tuple[str, str]) -> None:
    def refused(key: str, *words: str) -> str:
        found = CliRunner().invoke(app, [*words, "--url", urls[1], "--key", key])
        assert found.exit_code == 1
        assert found.stdout == ""
        return found.stderr

    assert "No object with this id" in await asyncio.to_thread(refused, "sk-admin", "tenants", "show", "zzz")
    said = await asyncio.to_thread(refused, "sk-auditor", "tenants", "create", "x")
    assert said.startswith("flexgate: the server says: ")
    assert "auditor" in said
    for strange in ("../../../health", "a?b", "t/archive"):
        assert "the server says" in await asyncio.to_thread(refused, "sk-admin", "tenants", "archive", strange)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--url", "http://127.0.0.1:9", "--demo"], "flexgate: --url and --demo name two places to act on"),
        (["--url", "http://127.0.0.1:9"], "flexgate: --key: the key is empty"),
        (["--url", "127.0.0.1:9", "--key", "k"], "flexgate: --url: '127.0.0.1:9' has no scheme or host"),
    ],
)
def test_a_target_that_cannot_be_meant_is_wrong_usage(options: list[str], said: str) -> None:
    for words in (
        ["tenants", "list"],
        ["admin-keys", "list"],
        ["agreements", "list"],
        ["policy", "export"],
        ["audit", "verify"],
    ):
        found = CliRunner().invoke(app, [*words, *options])
        assert found.exit_code == 2
        assert found.stderr.startswith(said)


def test_limits_without_a_limit_are_wrong_usage(real_store: Store) -> None:
    run = on(["--database-url", real_store.engine.url.render_as_string()])
    assert run("tenants", "set-limits", "t").exit_code == 2


@pytest.mark.parametrize(
    ("environment", "options", "said"),
    [
        ({"FLEXGATE_URL": "http://127.0.0.1:9"}, ["--state-dir", "missing"], "there is no policy database at '"),
        ({"FLEXGATE_STATE_DIR": "missing"}, ["--url", "http://127.0.0.1:9", "--key", "k"], "does not answer"),
    ],
)
def test_a_place_in_the_command_outweighs_one_in_the_environment(
    environment: dict[str, str], options: list[str], said: str
) -> None:
    for words in (
        ["tenants", "list"],
        ["admin-keys", "list"],
        ["agreements", "list"],
        ["policy", "export"],
        ["audit", "verify"],
    ):
        assert said in CliRunner().invoke(app, [*words, *options], env=environment).stderr


@pytest.mark.parametrize("answer", [[], "text", 1, None])
def test_an_answer_that_is_no_object_is_refused_in_a_sentence(answer: Any) -> None:
    with Api("http://127.0.0.1:1", "sk-x") as api:
        api.http = httpx.Client(
            base_url="http://127.0.0.1:1",
            transport=httpx.MockTransport(lambda _: httpx.Response(200, content=json.dumps(answer))),
        )
        with pytest.raises(ServerRefused, match="is not a flexgate server: its response is not a JSON object"):
            api.ask("GET", "/v1/agreements")


COMMANDS = {
    "tenants list": "",
    "tenants create": "x",
    "tenants show": "t",
    "tenants set-experts": "t news",
    "tenants create-key": "t x",
    "tenants revoke-key": "t key_x",
    "tenants limits": "t",
    "tenants set-limits": "t --total-tokens 9",
    "tenants archive": "t",
    "admin-keys list": "",
    "admin-keys create": "x",
    "admin-keys revoke": "key_x",
    "agreements list": "",
    "agreements show": "a-news",
    "agreements create": "-",
    "agreements revise": "a-news -",
    "agreements terminate": "a-news",
    "policy export": "",
    "policy diff": "-",
    "policy apply": "-",
    "policy rollback": "1",
    "policy explain": "t",
    "policy simulate": "-",
    "audit head": "",
    "audit verify": "",
    "audit export": "",
    "audit trim": "--older-than-days 1",
}


def roles_in_help() -> dict[str, str]:
    """The roles that the help of each command names for --key."""
    found = {}
    for group in ("tenants", "admin-keys", "agreements", "policy", "audit"):
        app = typer.main.get_command(importlib.import_module(SUBCOMMANDS[group][0]).app)
        for name, command in app.commands.items():  # type: ignore[attr-defined]
            for option in command.params:
                if option.name == "key":
                    found[f"{group} {name}"] = option.help
    return found


@pytest.mark.asyncio
@pytest.mark.parametrize("role", ["auditor", "owner"])
async def test_help_names_every_role_whose_key_a_command_takes(urls: tuple[str, str], role: str) -> None:
    named = roles_in_help()
    assert named.keys() == COMMANDS.keys()
    run = on(["--url", urls[1], "--key", f"sk-{role}"])

    def refused(words: str) -> bool:
        given = json.dumps({"format": "flexgate-policy/v1"} if words.startswith("policy") else TERMS)
        return f"role '{role}'" in run(*words.split(), stdin=given).stderr

    for command, arguments in COMMANDS.items():
        assert await asyncio.to_thread(refused, f"{command} {arguments}") == (role not in named[command]), command


@pytest.mark.asyncio
async def test_a_long_log_is_read_page_by_page(urls: tuple[str, str], real_store: Store) -> None:
    real_store.record([Event(at=1.0, actor="anonymous", action=DENIED, detail={"requests": n}) for n in range(250)])
    stored = [entry.sequence for entry in real_store.audit_log(limit=1000)]

    def read() -> tuple[list[int], list[int]]:
        """Sequence numbers, and how many requests had been sent when each was given."""
        with Api(urls[1], "sk-admin") as api:
            sent, ask = [0], api.ask

            def counted(*args: Any, **kwargs: Any) -> Any:
                sent[0] += 1
                return ask(*args, **kwargs)

            api.ask = counted  # type: ignore[method-assign]
            read = [(entry.sequence, sent[0]) for entry in ServerTarget(api).audit_log(stored[4])]
        return [sequence for sequence, _ in read], [count for _, count in read]

    sequences, sent = await asyncio.to_thread(read)
    assert sequences == stored[5:]
    assert sent == [1 + number // 100 for number in range(len(sequences))]
