"""A command acts on the place that was typed, or refuses and names both."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from flexgate.policies.store import Store
from flexgate.server.cli.main import app
from flexgate.server.lifecycle.store_settings import load_store_settings

URL = "http://127.0.0.1:9"
A = "sqlite:////a.db"
READING = [
    ["tenants", "list"],
    ["admin-keys", "list"],
    ["agreements", "list"],
    ["policy", "export"],
    ["audit", "verify"],
]


@pytest.fixture
def typed(tmp_path: Path) -> Store:
    """A database in a state directory."""
    store = Store.open(load_store_settings(state_dir=tmp_path / "typed").database())
    store.migrate()
    return store


@pytest.mark.parametrize("words", [["tenants", "create", "Acme"], ["tenants", "list"], ["audit", "verify"]])
def test_a_typed_state_dir_is_not_overridden_by_the_database_of_the_environment(
    words: list[str], typed: Store, real_store: Store, tmp_path: Path
) -> None:
    before = real_store.version(), typed.version()
    environment = {"FLEXGATE_DATABASE_URL": real_store.engine.url.render_as_string()}
    found = CliRunner().invoke(app, [*words, "--state-dir", str(tmp_path / "typed")], env=environment)
    assert (found.exit_code, found.stdout) == (2, "")
    assert found.stderr.startswith("flexgate: FLEXGATE_DATABASE_URL and --state-dir name two databases: ")
    assert (real_store.version(), typed.version()) == before


@pytest.mark.parametrize("words", READING)
@pytest.mark.parametrize(
    ("environment", "options", "said"),
    [
        (
            {"FLEXGATE_DATABASE_URL": A},
            ["--demo"],
            "FLEXGATE_DATABASE_URL and --demo name two databases",
        ),
        (
            {"FLEXGATE_DEMO": "1"},
            ["--database-url", A],
            "--database-url and FLEXGATE_DEMO name two databases",
        ),
        (
            {},
            ["--database-url", A, "--state-dir", "x"],
            "--database-url and --state-dir name two databases",
        ),
        ({"FLEXGATE_DEMO": "1"}, ["--state-dir", "x"], "FLEXGATE_DEMO and --state-dir name two databases"),
        ({}, ["--url", URL, "--demo"], "--url and --demo name two places to act on"),
        ({"FLEXGATE_URL": URL, "FLEXGATE_STATE_DIR": "x"}, [], "FLEXGATE_URL and FLEXGATE_STATE_DIR name two places"),
        ({"FLEXGATE_URL": URL, "FLEXGATE_DEMO": "1"}, [], "FLEXGATE_URL and FLEXGATE_DEMO name two places"),
        ({}, ["--key", "sk-x"], "--key is for a running server, and none is named: give --url"),
        ({"FLEXGATE_DATABASE_URL": A}, ["--key", "sk-x"], "--key is for a running server"),
        ({}, ["--key", "sk-x", "--state-dir", "x"], "--key is for a running server"),
    ],
)
def test_a_typed_option_that_would_be_ignored_is_refused_with_what_outweighs_it(
    words: list[str], environment: dict[str, str], options: list[str], said: str
) -> None:
    found = CliRunner().invoke(app, [*words, *options], env=environment)
    assert (found.exit_code, found.stdout) == (2, "")
    assert found.stderr.startswith(f"flexgate: {said}")


def test_the_environment_of_a_server_names_one_database(real_store: Store, tmp_path: Path) -> None:
    environment = {
        "FLEXGATE_DATABASE_URL": real_store.engine.url.render_as_string(),
        "FLEXGATE_STATE_DIR": str(tmp_path),
        "FLEXGATE_KEY": "sk-of-a-server",
    }
    before = real_store.version()
    assert CliRunner().invoke(app, ["tenants", "create", "Acme"], env=environment).exit_code == 0
    assert real_store.version() == before + 1


@pytest.mark.parametrize("typed", [("--demo", "--state-dir"), ("--demo",), ()])
def test_the_demo_in_a_state_directory_has_a_database_of_its_own(typed: tuple[str, ...], tmp_path: Path) -> None:
    stores = [Store.open(load_store_settings(state_dir=tmp_path, demo=demo).database()) for demo in (True, False)]
    for store in stores:
        store.migrate()
    before = [store.version() for store in stores]
    named = {"--demo": [], "--state-dir": [str(tmp_path)]}
    options = [word for option in typed for word in (option, *named[option])]
    variables = {"--demo": {"FLEXGATE_DEMO": "1"}, "--state-dir": {"FLEXGATE_STATE_DIR": str(tmp_path)}}
    environment = {name: value for option in named if option not in typed for name, value in variables[option].items()}
    assert CliRunner().invoke(app, ["tenants", "create", "Acme", *options], env=environment).exit_code == 0
    assert [store.version() for store in stores] == [before[0] + 1, before[1]]
