"""Clients that run in Node."""

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from conftest import Client

HERE = Path(__file__).parent


@dataclass(frozen=True)
class InNode(Client):
    """A client that a module of `node/` drives."""

    file: str


def locked(package: str) -> str:
    """The version of a package that the lock names."""
    lock = json.loads((HERE / "package-lock.json").read_text())
    return lock["packages"][f"node_modules/{package}"]["version"]


CLIENTS = [
    InNode(name, path, partial(locked, package), file)
    for name, file, package in (
        ("openai (Node)", "openai.mjs", "openai"),
        ("Vercel AI SDK, default provider", "ai-openai.mjs", "@ai-sdk/openai"),
        ("Vercel AI SDK, compatible provider", "ai-compatible.mjs", "@ai-sdk/openai-compatible"),
    )
    for path in ("conversation", "tools", "stream", "structured", "refusal")
]


@pytest.mark.parametrize("client", CLIENTS, ids=str)
def test_in_node(demo, client: InNode) -> None:
    assert (HERE / "node_modules").is_dir(), "run `make test-clients`, which installs them"
    node = shutil.which("node")
    assert node is not None
    done = subprocess.run(
        [node, "run.mjs", client.file, client.path],
        cwd=HERE / "node",
        env=os.environ | {"FLEXGATE_MODEL": demo.model, "AI_SDK_LOG_WARNINGS": "false"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-3000:]
