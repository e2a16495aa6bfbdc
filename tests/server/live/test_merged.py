"""A mergekit mixture of fine-tunes with different licences, from its own file to an answer, as the page says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import live_server
import pytest
from mergekit_model import write_merged

pytestmark = [pytest.mark.engine, pytest.mark.slow]

PAGE = Path(__file__).parents[3] / "docs" / "ownership.md"
KEY = re.compile(r"\bsk-[A-Za-z0-9_-]{20,}")


def blocks() -> list[tuple[str, str]]:
    """Language and text of each block of the section."""
    section = re.split(r"\n##+ ", PAGE.read_text().split("\n### From a merge to an answer\n")[1])[0]
    return re.findall(r"```(\w+)\n(.*?)```", section, re.DOTALL)


def commands(text: str) -> list[str]:
    """The commands of a block, without what they print."""
    return [match[0].removeprefix("$ ") for match in re.finditer(r"^\$ (?:.*\\\n)*.*$", text, re.MULTILINE)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the page is followed; with ``merged/``."""
    (tmp_path / "merged").mkdir()
    write_merged(tmp_path / "merged", ("chancery/mistral-law", "clinic/mistral-medicine"))
    return tmp_path


class Terminal:
    """A shell of the page, in which keys and the server's address are filled in."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.key, self.url = folder, "", ""
        self.exported = ""

    def type(self, command: str) -> str:
        """Run one command as it is written; returns what it printed."""
        command = command.replace("sk-…", self.key).replace("http://127.0.0.1:8000", self.url)
        if command.startswith("export "):
            self.exported = f"{command}; "
            return ""
        names = {name: value for name, value in os.environ.items() if not name.startswith("FLEXGATE_")}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "-c", self.exported + command],
            cwd=self.folder,
            env=names | {"PATH": path, "PYTHONSAFEPATH": "1", "COLUMNS": "300"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, (command, done.stderr)
        return done.stdout


@pytest.fixture
def terminal(folder: Path) -> Iterator[Terminal]:
    """The page was followed up to the running server."""
    here, (propose, filled, (_, started), *_) = Terminal(folder), blocks()
    (command,) = commands(propose[1])
    here.type(command)
    assert "owner: null" in (folder / "units.yaml").read_text()
    (folder / "units.yaml").write_text(filled[1])
    assign, serve = commands(started)
    here.type(assign)
    assert serve == "flexgate serve merged/"
    state = folder / "state"
    state.mkdir()
    url = f"sqlite:///{state / 'flexgate.db'}"
    server = live_server.start(folder / "merged", state, "--served-model-name=merged", database_url=url)
    here.url = server.url
    (here.key,) = set(KEY.findall(server.log.read_text()))
    yield here
    live_server.stop(server)


def rows(table: str) -> dict[str, tuple[str, str]]:
    """Of each expert whether it is allowed, and why."""
    cells = [re.split(r"  +", line.strip()) for line in table.splitlines()[1:] if line.strip()]
    return {expert: (allowed, why) for expert, allowed, _, why in cells}


def test_the_page_leads_from_a_merge_to_an_answer_word_for_word(terminal: Terminal) -> None:
    _, _, _, (_, policy), (_, applied), (_, asked) = blocks()
    (terminal.folder / "policy.yaml").write_text(policy)
    export, apply, of_bank, of_hospital = commands(applied)
    for command in (export, apply):
        terminal.type(command)
    bank, hospital = rows(terminal.type(of_bank)), rows(terminal.type(of_hospital))
    assert {expert: allowed for expert, (allowed, _) in bank.items()} == {
        "public": "allowed",
        "mistral-law": "allowed",
        "mistral-medicine": "excluded",
    }
    assert {allowed for allowed, _ in hospital.values()} == {"allowed"}
    assert hospital["mistral-medicine"][1] == "by agreement/medicine-for-the-hospital@1"
    create, ask = commands(asked)
    (terminal.key,) = KEY.findall(terminal.type(create))
    answer: dict[str, Any] = json.loads(terminal.type(ask))
    parts = {part["id"]: part["share_ppm"] for part in answer["flexgate"]["attribution"]["experts"]}
    assert answer["flexgate"]["allowed"] == ["public", "mistral-law", "mistral-medicine"]
    assert sum(parts.values()) == 1_000_000
    assert all(parts.values())

    (terminal.key,) = KEY.findall(terminal.type(create.replace("hospital", "bank")))
    answer = json.loads(terminal.type(ask))
    parts = {part["id"]: part["share_ppm"] for part in answer["flexgate"]["attribution"]["experts"]}
    assert answer["flexgate"]["allowed"] == ["public", "mistral-law"]
    assert parts["mistral-medicine"] == 0
