"""`flexgate tenants`: a tenant's life without a server."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from flexgate.policies.errors import ChangeRefused
from flexgate.policies.store import Store
from flexgate.server.cli.database_target import DatabaseTarget
from flexgate.server.http.auth import KeyRevoked, KeyWrong, authenticate

Run = Callable[..., Any]


def test_a_tenants_life(flexgate: Run, real_store: Store) -> None:
    project = flexgate("tenants", "create", "Acme").output.strip()
    assert project.startswith("proj_")
    secret = flexgate("tenants", "create-key", project, "robot", "--expires-in-days", "30").output.strip()
    principal = authenticate(real_store.snapshot(), f"Bearer {secret}", 5.0)
    assert principal.tenant_id == project
    assert flexgate("tenants", "set-experts", project, "news", "math").output == "allow_list: math, news\n"
    assert real_store.snapshot().tenants[project].named == {"news", "math"}
    assert flexgate("tenants", "set-experts", project, "--none", "--mode", "deny_list").exit_code == 0
    shown = json.loads(flexgate("tenants", "show", project).output)
    assert (shown["mode"], shown["expert_ids"]) == ("deny_list", [])
    (key,) = shown["keys"]
    assert secret not in json.dumps(shown)
    assert flexgate("tenants", "revoke-key", project, key["id"]).exit_code == 0
    with pytest.raises(KeyRevoked):
        authenticate(real_store.snapshot(), f"Bearer {secret}", 9e9)
    assert flexgate("tenants", "archive", project).exit_code == 0
    with pytest.raises(KeyWrong):
        authenticate(real_store.snapshot(), f"Bearer {secret}", 9e9)
    assert project not in flexgate("tenants", "list").output
    assert f"{project}  Acme (archived)" in flexgate("tenants", "list", "--archived").output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("show", "zzz"), "there is no project 'zzz'"),
        (("set-experts", "t", "zzz"), "project 't' names the unknown expert 'zzz': use one of math, news, secret"),
        (("set-experts", "t", "public"), "'public' cannot be listed, because every project has it"),
        (("set-experts", "t", "--add", "zzz"), "project 't' names the unknown expert 'zzz': use one of math, news"),
        (("set-experts", "t", "--remove", "zzz"), "'zzz' is not on the list, which has: news"),
        (("revoke-key", "t", "key_zzz"), "there is no key 'key_zzz' in this project"),
        (("create", ""), "'name' must not be empty"),
        (("archive", "zzz"), "there is no project 'zzz'"),
    ],
)
def test_refusals_are_one_sentence(flexgate: Run, arguments: tuple[str, ...], said: str) -> None:
    found = flexgate("tenants", *arguments)
    assert found.exit_code == 1
    assert said in found.stderr
    assert len(found.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("news", "--none"),
        ("news", "--add", "math"),
        ("--none", "--remove", "news"),
        ("--add", "math", "--mode", "deny_list"),
    ],
)
def test_a_list_that_is_not_clear_is_wrong_usage(flexgate: Run, real_store: Store, arguments: tuple[str, ...]) -> None:
    before = real_store.snapshot()
    assert flexgate("tenants", "set-experts", "t", *arguments).exit_code == 2
    assert real_store.snapshot() == before


def test_a_list_keeps_its_mode_while_experts_are_added_and_removed(flexgate: Run) -> None:
    def shown(*arguments: str) -> str:
        return str(flexgate("tenants", "set-experts", "t", *arguments).output)

    assert shown("--none", "--mode", "deny_list") == "deny_list: none\n"
    assert shown("math") == "deny_list: math\n"
    assert shown("--add", "news", "--remove", "math") == "deny_list: news\n"
    assert shown("--none") == "deny_list: none\n"


def test_a_list_that_was_changed_meanwhile_is_not_replaced(real_store: Store) -> None:
    """Otherwise adding one expert would bring back another that an administrator has just removed."""
    target = DatabaseTarget(real_store)
    read = {"mode": "allow_list", "expert_ids": ["math", "news"]}
    target.set_experts("t", read)
    target.set_experts("t", {"mode": "allow_list", "expert_ids": ["math"]}, before=read)
    with pytest.raises(ChangeRefused, match="'t' was changed meanwhile: read it again"):
        target.set_experts("t", {"mode": "allow_list", "expert_ids": ["math", "news", "secret"]}, before=read)
    assert real_store.snapshot().tenants["t"].named == {"math"}


def test_no_database_is_made_by_looking_at_one(flexgate: Run, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/nothing.db"
    found = flexgate("tenants", "list", "--database-url", url)
    assert found.exit_code == 1
    assert "start the server once, which creates it" in found.stderr
    assert not (tmp_path / "nothing.db").exists()


@pytest.mark.parametrize(("revision", "said"), [("0003", "start this version's server"), ("9999", "newer version")])
def test_a_store_of_another_version_is_left_alone(flexgate: Run, real_store: Store, revision: str, said: str) -> None:
    with real_store.engine.begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = :r"), {"r": revision})
    found = flexgate("tenants", "create", "Acme")
    assert found.exit_code == 1
    assert said in found.stderr


def test_the_commands_of_the_store_do_not_import_vllm() -> None:
    code = (
        "import sys; import flexgate.server.cli.{0}; assert not {{'vllm', 'torch', 'transformers'}} & set(sys.modules)"
    )
    for name in ("policy", "tenants", "audit"):
        subprocess.run([sys.executable, "-c", code.format(name)], check=True, cwd="/")
