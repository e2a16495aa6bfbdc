"""Clients that run in Node."""

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CLIENT = "Node"  # each of CLIENTS is recorded by its own name


@dataclass(frozen=True)
class Client:
    """A module of `node/`, and the package that it drives."""

    name: str
    file: str
    package: str
    path: str

    @property
    def version(self) -> str:
        """As the lock says."""
        lock = json.loads((HERE / "package-lock.json").read_text())
        return lock["packages"][f"node_modules/{self.package}"]["version"]


CLIENTS = [
    Client(name, file, package, path)
    for name, file, package in (
        ("openai (Node)", "openai.mjs", "openai"),
        ("Vercel AI SDK, default provider", "ai-openai.mjs", "@ai-sdk/openai"),
        ("Vercel AI SDK, compatible provider", "ai-compatible.mjs", "@ai-sdk/openai-compatible"),
    )
    for path in ("conversation", "tools", "stream", "structured", "refusal")
]


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: f"{client.file}-{client.path}")
def test_in_node(demo, client: Client) -> None:
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
