"""The command, run in this process on a store of the test's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from flexgate.policies.store import Store
from flexgate.server.cli.main import app


@pytest.fixture
def flexgate(real_store: Store, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """`flexgate("policy", "export")`."""
    monkeypatch.setenv("FLEXGATE_DATABASE_URL", real_store.engine.url.render_as_string())

    def run(*arguments: str, stdin: str | None = None) -> Result:
        return CliRunner().invoke(app, list(arguments), input=stdin)

    return run


@pytest.fixture
def policy_file(tmp_path: Path) -> Callable[..., str]:
    """A policy file of the given content."""

    def write(content: Any) -> str:
        path = tmp_path / "policy.yaml"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return str(path)

    return write
