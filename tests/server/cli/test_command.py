"""The command as a whole: version, help, what it imports, and whom it blames."""

from __future__ import annotations

import asyncio
import importlib
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from flexgate.server.cli.main import SUBCOMMANDS, app
from flexgate.server.lifecycle.settings import Settings

Run = Callable[..., Any]


def commands(command: Any, name: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield name
    for inner, sub in getattr(command, "commands", {}).items():
        yield from commands(sub, (*name, inner))


def help_of(*words: str) -> str:
    return CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "200"}).output


def shown_commands() -> list[str]:
    """Every command of the page for the first hour, but for those that make experts."""
    page = (Path(__file__).parents[3] / "docs" / "getting-started.md").read_text()
    return re.findall(r"^\$ flexgate (?!experts extract)(.+)$", page, re.MULTILINE)


@pytest.mark.parametrize("words", shown_commands())
def test_a_command_of_the_first_hour_can_be_typed(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXGATE_KEY", "sk-x")
    first, *rest = shlex.split(words)
    command = typer.main.get_command(importlib.import_module(SUBCOMMANDS[first][0]).app)
    if first != "serve":
        command = command.get_command(typer.Context(command), rest.pop(0))
        assert command is not None
    command.make_context(first, rest)


def test_the_version_is_printed() -> None:
    assert CliRunner().invoke(app, ["--version"]).output == "flexgate 0.1.0\n"


def test_no_command_offers_a_completion_that_does_not_work() -> None:
    for name, (module, _) in SUBCOMMANDS.items():
        for words in commands(typer.main.get_command(importlib.import_module(module).app), (name,)):
            assert "completion" not in help_of(*words), words


def every_command() -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, (module, _) in SUBCOMMANDS.items():
        app = typer.main.get_command(importlib.import_module(module).app)
        for words in commands(app, (name,)):
            command: Any = app
            for word in words[1:]:
                command = command.commands[word]
            yield words, command


def test_every_argument_and_option_has_help() -> None:
    for words, command in every_command():
        assert command.help, words
        assert [p.name for p in command.params if not getattr(p, "help", None)] == [], words


def test_help_has_one_word_for_one_thing() -> None:
    """What holds files is a folder, but for the state directory; what a server sends is a response."""
    for words, command in every_command():
        text = " ".join([command.help, *(parameter.help for parameter in command.params if parameter.name != "help")])
        assert not re.search(r"(?<!tate )director(y|ies)", text), words
        assert words[0] == "experts" or not re.search(r"\banswers?\b", text), words


def test_help_of_serve_names_default_choices_and_variable_of_every_setting() -> None:
    shown = " ".join(help_of("serve").split())
    for name, field in Settings.model_fields.items():
        assert f"FLEXGATE_{name.upper()}" in shown
        assert f"--{name.replace('_', '-')}" in shown or name == "model"
        if type(field.default) in (int, float, str):
            assert f"FLEXGATE_{name.upper()}, default {field.default})" in shown
    assert "--dtype <auto|bfloat16|float32>" in shown
    assert "--moe-kernels <flexgate|vllm>" in shown


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("nonsense", "--database-url: not a database's URL; give sqlite:////FOLDER/flexgate.db or postgresql+psycopg:"),
        ("mysql://user:hunter2@host/name", "--database-url: 'mysql' is not served as a policy database; give sqlite:"),
        ("sqlite://", "--database-url: a database in memory would be lost with the server; give sqlite:"),
        ("postgresql://host:port/name", "--database-url: not a database's URL; give sqlite:"),
    ],
)
@pytest.mark.parametrize("words", [("tenants", "list"), ("policy", "export"), ("audit", "head"), ("serve", "model")])
def test_a_database_url_that_names_none_is_one_sentence(words: tuple[str, ...], url: str, said: str) -> None:
    found = CliRunner().invoke(app, [*words, "--database-url", url])
    assert found.exit_code == (2 if words[0] == "serve" else 1)
    assert found.stderr.startswith(f"flexgate: {said}")
    assert len(found.stderr.splitlines()) == 1
    assert "hunter2" not in found.stderr


@pytest.mark.parametrize(
    ("url", "key", "said"),
    [
        ("http://127.0.0.1:8000", "", "error: --key: the key is empty: give one here or in FLEXGATE_KEY"),
        ("http://127.0.0.1:8000", "sk-a\nb", "error: --key: the key has characters that are not allowed"),
        ("localhost:8000", "sk-a", "error: --url: 'localhost:8000' has no scheme or host: give a URL such as http:"),
        ("http://", "sk-a", "error: --url: 'http://' has no scheme or host"),
        ("http://host:port", "sk-a", "error: --url: 'http://host:port' is not a server's URL: Invalid port"),
    ],
)
def test_what_no_server_could_take_is_blamed_on_the_caller(url: str, key: str, said: str) -> None:
    found = CliRunner().invoke(app, ["experts", "list", "--url", url, "--key", key])
    assert found.exit_code == 2
    assert found.stderr.startswith(said)


@pytest.mark.parametrize("words", ["list", "revoke news", "add nowhere"])
def test_the_experts_of_a_server_are_changed_without_pytorch(words: str) -> None:
    program = (
        "import sys; from flexgate.server.cli.main import app\n"
        f"app(['experts', *{words.split()}, '--url', 'http://127.0.0.1:9', '--key', 'k'], standalone_mode=False)"
    )
    check = "\nimport atexit; atexit.register(lambda: print('torch' in sys.modules))\n"
    first, rest = program.split("\n")
    done = subprocess.run([sys.executable, "-c", first + check + rest], capture_output=True, text=True, timeout=120)
    assert done.stdout == "False\n"
    assert "127.0.0.1:9" in done.stderr or "nowhere is not an expert package" in done.stderr


@pytest.mark.asyncio
async def test_the_experts_of_a_server_are_listed_in_columns(urls: tuple[str, str]) -> None:
    def listed(key: str) -> list[str]:
        words = ["experts", "list", "--url", urls[1], "--key", key]
        return CliRunner().invoke(app, words).output.splitlines()

    shown = await asyncio.to_thread(listed, "sk-owner")
    assert [line.split() for line in shown] == [
        ["id", "owner", "domain", "live", "visibility", "slot", "grade"],
        ["news", "gazette", "yes", "listed", "1", "removed"],
    ]
    assert shown[0].index("owner") == shown[1].index("gazette")


def test_a_file_that_changes_nothing_is_said_to_change_nothing(flexgate: Run, policy_file: Run) -> None:
    same = policy_file(flexgate("policy", "export").output)
    assert flexgate("policy", "diff", same).output == "nothing would change\n"
    assert flexgate("policy", "apply", same, "--dry-run").output == "nothing would change\n"
    assert flexgate("policy", "apply", same).output == "nothing to change\n"
    assert flexgate("policy", "simulate", same).output == "nothing would change for any tenant\n"
    assert flexgate("policy", "diff", same, "--json").output == "[]\n"


def test_a_tenants_name_is_shown_as_it_is(flexgate: Run) -> None:
    flexgate("tenants", "create", "[red]A")
    assert "[red]A" in flexgate("tenants", "list").output
