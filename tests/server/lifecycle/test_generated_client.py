"""A client that is generated from the OpenAPI document: all of it has types, and it talks to the server."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from flexgate.server.lifecycle.app import build_app, document

pytestmark = pytest.mark.slow

# A program of its author's, who knows the types alone.
SAMPLE = """
from generated import AuthenticatedClient
from generated.api.agreements import agreements_retrieve
from generated.api.experts import experts_list
from generated.api.projects import projects_list
from generated.models import AgreementObject, ErrorBody, ExpertForTenant, ExpertList, ProjectPage


def project_names(client: AuthenticatedClient) -> list[str]:
    answer = projects_list.sync(client=client, limit=2)
    return [project.name for project in answer.data] if isinstance(answer, ProjectPage) else []


def allowed(client: AuthenticatedClient) -> dict[str, bool]:
    answer = experts_list.sync(client=client)
    assert isinstance(answer, ExpertList)
    return {expert.id: expert.allowed for expert in answer.data if isinstance(expert, ExpertForTenant)}


def agreement(client: AuthenticatedClient, id_: str) -> str:
    answer = agreements_retrieve.sync(id_, client=client)
    if isinstance(answer, AgreementObject):
        return answer.owner
    return (answer.error.code or "") if isinstance(answer, ErrorBody) else ""
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The client as the package `generated`, and the program that uses it."""
    folder = tmp_path_factory.mktemp("client")
    (folder / "document.json").write_text(json.dumps(document()))
    (folder / "config.json").write_text(json.dumps({"post_hooks": []}))
    command = ["openapi_python_client", "generate", "--path", "document.json", "--config", "config.json"]
    command += ["--meta", "none", "--output-path", "generated", "--fail-on-warning"]
    made = subprocess.run([sys.executable, "-m", *command], cwd=folder, capture_output=True, text=True, timeout=120)
    assert made.returncode == 0, made.stdout + made.stderr
    (folder / "sample.py").write_text(SAMPLE)
    return folder


def checked(folder: Path, name: str) -> str:
    """What mypy says of a program, and of the client that it uses."""
    command = [sys.executable, "-m", "mypy", "--config-file=", name]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300).stdout


def test_a_program_that_uses_it_has_types(folder: Path) -> None:
    assert "Success: no issues found" in checked(folder, "sample.py")
    (folder / "wrong.py").write_text(
        SAMPLE.replace("project.name", "project.nome").replace("answer.owner", "answer.version")
    )
    found = checked(folder, "wrong.py")
    assert 'has no attribute "nome"' in found
    assert 'got "int", expected "str"' in found


@pytest.fixture
def sample(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The program as a module."""
    monkeypatch.syspath_prepend(folder)
    spec = importlib.util.spec_from_file_location("sample", folder / "sample.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for name in [name for name in sys.modules if name.partition(".")[0] == "generated"]:
        del sys.modules[name]


def test_it_reads_what_the_server_answers(sample: Any, services: Any) -> None:
    with TestClient(build_app(services)) as http:

        def client(key: str) -> Any:
            http.headers["authorization"] = f"Bearer {key}"
            return sample.AuthenticatedClient("http://testserver", key).set_httpx_client(http)

        assert sample.project_names(client("sk-admin")) == ["t", "u"]
        assert sample.allowed(client("sk-t")) == {"public": True, "news": True, "math": False}
        assert sample.agreement(client("sk-owner"), "a-news") == "gazette"
        assert sample.agreement(client("sk-owner"), "a-math") == "not_found"
