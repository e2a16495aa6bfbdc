"""Settings, and the command's options that set them."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest
import typer
from pydantic import Field
from typer.testing import CliRunner

from flexgate.server.lifecycle.settings import Settings, is_loopback, load_settings
from flexgate.server.lifecycle.store_settings import SettingsError, StoreSettings

MODEL = Path("/models/m")


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import os

    for name in [name for name in os.environ if name.startswith("FLEXGATE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))


def test_the_defaults_are_loopback_and_the_documented_limits() -> None:
    settings = load_settings(model=MODEL)
    assert (settings.host, settings.port, settings.hosts) == ("127.0.0.1", 8000, None)
    assert settings.max_body_bytes == 1024 * 1024
    limits = settings.limits
    assert (limits.n, limits.prompts, limits.logprobs, limits.grammar_bytes) == (8, 16, 20, 16384)


def test_variables_set_and_options_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXGATE_PORT", "9000")
    monkeypatch.setenv("FLEXGATE_SERVED_MODEL_NAME", '["a", "b"]')
    assert load_settings(model=MODEL).port == 9000
    assert load_settings(model=MODEL).served_model_name == ("a", "b")
    assert load_settings(model=MODEL, port=9001).port == 9001


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "name a model's folder, or start with --demo"),
        ({"model": MODEL, "demo": True}, "--demo and MODEL name two models"),
        ({"demo": True, "host": "0.0.0.0"}, "--demo listens on loopback only, not on 0.0.0.0"),
        ({"demo": True, "host": "0.0.0.0", "allow_remote": True}, "loopback only"),
        ({"demo": True, "database_url": "sqlite:///x.db"}, "--demo and --database-url name two databases"),
        ({"model": MODEL, "host": "0.0.0.0"}, "--allow-remote"),
        ({"model": MODEL, "host": "example.org"}, "not a loopback address"),
        ({"model": MODEL, "port": 70000}, "--port must be at most 65535"),
        ({"model": MODEL, "dtype": "float16"}, "--dtype must be 'auto', 'bfloat16' or 'float32'"),
        ({"model": MODEL, "moe_kernels": "auto"}, "--moe-kernels must be 'flexgate' or 'vllm'"),
        ({"model": MODEL, "slots": "r8=1", "max_experts": 4}, "--slots and --max-experts both say how many slots"),
        ({"model": MODEL, "slots": "r0=1"}, "'r0=1' is not a kind and a number, as in full=2,r64=8"),
        ({"model": MODEL, "max_logprobs": 21}, "--max-logprobs must be at most 20"),
        ({"model": MODEL, "chat_template": "/no/such.jinja"}, "--chat-template: /no/such.jinja is not a file"),
        ({"model": MODEL, "chat_template": "{% if %}" * 99}, "--chat-template: {% if %}{% if %}"),
    ],
)
def test_what_does_not_fit_together_is_one_sentence(given: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError) as refused:
        load_settings(**given)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("PORT", "abc", "FLEXGATE_PORT must be an integer"),
        ("SERVED_MODEL_NAME", "a", 'FLEXGATE_SERVED_MODEL_NAME: \'a\' is not a JSON list, such as ["a", "b"]'),
        ("SERVED_MODEL_NAME", "[1]", "FLEXGATE_SERVED_MODEL_NAME must be a string"),
        ("CORS_ORIGIN", '"https://a"', "FLEXGATE_CORS_ORIGIN: '\"https://a\"' is not a JSON list"),
        ("CORS_ORIGIN", "5", "FLEXGATE_CORS_ORIGIN: '5' is not a JSON list"),
        ("EXPERTS_DIR", "/no/such", "FLEXGATE_EXPERTS_DIR: '/no/such' is not a folder"),
    ],
)
def test_what_is_wrong_with_a_variable_is_one_sentence_that_names_it(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str
) -> None:
    monkeypatch.setenv(f"FLEXGATE_{variable}", value)
    with pytest.raises(SettingsError) as refused:
        load_settings(model=MODEL)
    assert str(refused.value).startswith(message)
    assert "\n" not in str(refused.value)


def test_a_state_directory_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match=r"cannot make the state directory '.*/file/x' \(Not a directory\); give"):
        load_settings(model=MODEL, state_dir=tmp_path / "file/x").database()


def test_an_explicit_flag_allows_another_address() -> None:
    assert load_settings(model=MODEL, host="0.0.0.0", allow_remote=True).host == "0.0.0.0"


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("localhost.evil.test", False),
    ],
)
def test_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


def test_the_demo_has_a_database_of_its_own(tmp_path: Path) -> None:
    normal = load_settings(model=MODEL).database()
    demo = load_settings(demo=True).database()
    assert normal == f"sqlite:///{tmp_path}/flexgate/flexgate.db"
    assert demo == f"sqlite:///{tmp_path}/flexgate/demo.db"
    assert (tmp_path / "flexgate").stat().st_mode & 0o077 == 0


POSTGRES = "postgresql://flexgate:old@db:5432/policy"


def _directory(url: str) -> Path:
    return load_settings(model=MODEL, database_url=url).directory()


@pytest.mark.parametrize(
    ("url", "same"),
    [
        ("postgresql://flexgate:new@db:5432/policy", True),
        ("postgresql+psycopg://flexgate@db:5432/policy", True),
        (f"{POSTGRES}?sslmode=verify-full&password=new", True),
        ("postgresql://flexgate:old@other:5432/policy", False),
        ("postgresql://flexgate:old@db:5433/policy", False),
        ("postgresql://flexgate:old@db:5432/other", False),
        (f"{POSTGRES}?options=-csearch_path%3Dother", False),
        (f"{POSTGRES}?host=/run/other", False),
    ],
)
def test_a_database_keeps_its_directory_whatever_its_password_and_parameters(url: str, same: bool) -> None:
    assert (_directory(url) == _directory(POSTGRES)) is same


@pytest.fixture(scope="module")
def served_options() -> dict[str, Any]:
    """The parameters of `flexgate serve` by their settings' names, as the command has them."""
    from flexgate.server.cli.serve import app

    return {str(parameter.name): parameter for parameter in typer.main.get_command(app).params}


@pytest.mark.parametrize("name", Settings.model_fields)
def test_serve_shows_the_variable_and_the_default_of_every_setting(served_options: dict[str, Any], name: str) -> None:
    field, option = Settings.model_fields[name], served_options[name]
    assert field.description
    assert option.help.startswith(field.description)
    assert f"FLEXGATE_{name.upper()}" in option.help
    if name == "model":
        return
    assert f"--{name.replace('_', '-')}" in option.opts
    if field.default not in (None, ()):
        default = ("no", "yes")[field.default] if isinstance(field.default, bool) else field.default
        assert f", default {default})" in option.help


def test_serve_shows_the_choices_of_every_setting_that_has_some() -> None:
    from flexgate.server.cli.serve import app

    shown = " ".join(CliRunner(env={"COLUMNS": "100"}).invoke(app, ["--help"]).output.split())
    choices = {
        n: get_args(f.annotation) for n, f in Settings.model_fields.items() if get_origin(f.annotation) is Literal
    }
    assert "log_level" in choices
    for name, values in choices.items():
        assert f"--{name.replace('_', '-')} <{'|'.join(values)}>" in shown


def test_serve_has_no_option_that_is_no_setting(served_options: dict[str, Any]) -> None:
    assert served_options.keys() - {"help"} == Settings.model_fields.keys()


def test_a_setting_that_is_added_is_an_option_without_another_edit() -> None:
    from flexgate.server.cli.options import given, parameters

    class More(Settings):
        speed: Annotated[Literal["slow", "fast"], Field(description="How fast.")] = "slow"
        colour: Annotated[tuple[str, ...], Field(description="Colours; by default none.")] = ()

    def command(**values: Any) -> None:
        settings = More(model=MODEL, **given(values))
        typer.echo(f"{settings.speed} {settings.colour} {settings.port}")

    command.__signature__ = inspect.Signature(parameters(More, argument="model"))  # type: ignore[attr-defined]
    app = typer.Typer(rich_markup_mode=None)
    app.command()(command)
    run = CliRunner(env={"FLEXGATE_COLOUR": '["red"]', "FLEXGATE_PORT": "9", "COLUMNS": "200"}).invoke
    assert run(app, ["--speed", "fast"]).output == "fast ('red',) 9\n"
    assert run(app, ["--colour", "a", "--colour", "b", "--port", "8"]).output == "slow ('a', 'b') 8\n"
    assert "'slow', 'fast'" in run(app, ["--speed", "other"]).output
    shown = " ".join(run(app, ["--help"]).output.split())
    assert "--speed <slow|fast> How fast. (FLEXGATE_SPEED, default slow)" in shown
    assert "--colour <str> Colours; by default none. (may be repeated, FLEXGATE_COLOUR as a JSON" in shown


def test_commands_on_the_database_read_the_settings_variables() -> None:
    from flexgate.server.cli.tenants import app

    (listed,) = [command for name, command in typer.main.get_command(app).commands.items() if name == "list"]  # type: ignore[attr-defined]
    variables = {parameter.name: parameter.envvar for parameter in listed.params}
    assert {name: variables[name] for name in StoreSettings.model_fields} == {
        name: f"FLEXGATE_{name.upper()}" for name in StoreSettings.model_fields
    }


def test_help_comes_without_importing_vllm_or_torch() -> None:
    program = (
        "import sys; from typer.testing import CliRunner; from flexgate.server.cli.main import app;"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0;"
        "result = CliRunner().invoke(app, ['serve', '--help']);"
        "assert '--allow-remote' in result.output, result.output;"
        "assert not {'vllm', 'torch', 'fastapi', 'sqlalchemy'} & set(sys.modules)"
    )
    environment = {"COLUMNS": "200", "PYTHONSAFEPATH": "1"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment, timeout=120)


def test_our_kernels_folder_on_the_path_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import flexgate.server.cli.serve as cli_serve

    root = Path(cli_serve.__file__).resolve().parents[2]
    cli_serve.refuse_shadowed_kernels()
    monkeypatch.setattr(sys, "path", [*sys.path, str(root)])
    with pytest.raises(SettingsError, match="kernels shadows the Python package 'kernels'"):
        cli_serve.refuse_shadowed_kernels()


def test_administration_needs_a_port_of_its_own() -> None:
    assert load_settings(model=MODEL, port=0, admin_port=0).admin_port == 0
    with pytest.raises(SettingsError, match="--admin-port and --port are both 8000"):
        load_settings(model=MODEL, admin_port=8000)
