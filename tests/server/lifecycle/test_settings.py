"""Settings, and the command's options that set them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flexgate.server.lifecycle.settings import Settings, SettingsError, is_loopback, load_settings

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
        ({}, "name a model directory, or start with --demo"),
        ({"model": MODEL, "demo": True}, "--demo and MODEL name two models"),
        ({"demo": True, "host": "0.0.0.0"}, "--demo listens on loopback only, not on 0.0.0.0"),
        ({"demo": True, "host": "0.0.0.0", "allow_remote": True}, "loopback only"),
        ({"demo": True, "database_url": "sqlite:///x.db"}, "--demo and --database-url name two databases"),
        ({"model": MODEL, "host": "0.0.0.0"}, "--allow-remote"),
        ({"model": MODEL, "host": "example.org"}, "not a loopback address"),
        ({"model": MODEL, "port": 70000}, "--port: Input should be less than or equal to 65535"),
        ({"model": MODEL, "dtype": "float16"}, "--dtype: Input should be"),
        ({"model": MODEL, "moe_kernels": "auto"}, "--moe-kernels: Input should be 'flexgate' or 'vllm'"),
        ({"model": MODEL, "max_logprobs": 21}, "--max-logprobs: "),
        ({"model": MODEL, "chat_template": "/no/such.jinja"}, "--chat-template: /no/such.jinja is not a file"),
        ({"model": MODEL, "chat_template": "{% if %}" * 99}, "--chat-template: {% if %}{% if %}"),
    ],
)
def test_what_does_not_fit_together_is_one_sentence(given: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError) as refused:
        load_settings(**given)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


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


def test_every_setting_is_an_option_of_serve() -> None:
    import inspect

    from flexgate.server.cli.serve import serve

    assert set(inspect.signature(serve).parameters) == set(Settings.model_fields)


def test_every_setting_has_a_description() -> None:
    assert all(field.description for field in Settings.model_fields.values())


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
    with pytest.raises(SettingsError, match="'kernels' hides"):
        cli_serve.refuse_shadowed_kernels()


def test_administration_needs_a_port_of_its_own() -> None:
    assert load_settings(model=MODEL, port=0, admin_port=0).admin_port == 0
    with pytest.raises(SettingsError, match="--admin-port and --port are both 8000"):
        load_settings(model=MODEL, admin_port=8000)
