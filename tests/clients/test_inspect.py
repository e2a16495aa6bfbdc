"""inspect-ai, whose `openai` is newer than the other clients can use: it runs in an environment of its own."""

import os
import subprocess
from functools import partial

import pytest
from conftest import ROOT, Client, installed

PYTHON = ROOT / "build/clients/inspect/bin/python"
CLIENTS = [
    Client("inspect-ai", path, partial(installed, "inspect-ai", PYTHON))
    for path in ("conversation", "tools", "stream", "structured", "refusal")
]


@pytest.mark.parametrize("client", CLIENTS, ids=str)
def test_inspect(demo, client: Client, tmp_path) -> None:
    done = subprocess.run(
        [PYTHON, ROOT / "tests/clients/inspect_paths.py", client.path],
        cwd=tmp_path,
        env=os.environ | {"FLEXGATE_MODEL": demo.model, "INSPECT_DISPLAY": "none"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-3000:]
