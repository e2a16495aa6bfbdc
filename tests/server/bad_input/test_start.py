"""A start that is refused: before vLLM is loaded, and with nothing used up."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from policy_file import refusal
from typer.testing import Result

from flexgate.policies.documents import Role
from flexgate.policies.store import Store


def test_a_start_that_fails_has_made_no_admin_key_that_nobody_saw(serve: Callable[..., Result], tmp_path: Path) -> None:
    assert refusal(serve()).endswith("the engine would be started now")
    store = Store.open(f"sqlite:///{tmp_path / 'state' / 'flexgate.db'}")
    assert not [key for key in store.keys() if key.role is Role.ADMIN]
    store.close()


def test_a_bad_trusted_key_is_refused_before_the_engine_starts(serve: Callable[..., Result], tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    folder.mkdir()
    (folder / "acme.pem").write_text("no key")
    assert str(folder / "acme.pem") in refusal(serve(f"--trusted-keys={folder}"))


WRONG = {
    "port": (["--port={port}"], "cannot listen on 127.0.0.1:{port}: Address already in use"),
    "address": (["--host=300.1.1.1", "--allow-remote"], "cannot listen on 300.1.1.1:0: Name or service not known"),
    "database URL": (
        ["--database-url=nonsense"],
        "--database-url: not a database's URL; give sqlite:////FOLDER/flexgate.db or "
        "postgresql+psycopg://USER:PASSWORD@HOST/DATABASE",
    ),
    "database file": (
        ["--database-url=sqlite:///{tmp}/none/x.db"],
        "the store cannot be used: unable to open database file (sqlite:///{tmp}/none/x.db)",
    ),
    "database server": (
        ["--database-url=postgresql+psycopg://u:secret@127.0.0.1:{closed}/x"],
        "Is the server running on that host and accepting TCP/IP connections? "
        "(postgresql+psycopg://u:***@127.0.0.1:{closed}/x)",
    ),
    "state directory": (
        ["--state-dir={tmp}/file/x"],
        "cannot make the state directory '{tmp}/file/x' (Not a directory); "
        "give --state-dir a folder that can be written",
    ),
    "packages": (["--experts-dir={tmp}/none"], "--experts-dir: '{tmp}/none' is not a folder"),
    "keys": (["--trusted-keys={tmp}/none"], "{tmp}/none is not a folder of trusted keys (one OWNER.pem per owner)"),
    "length": (
        ["--max-model-len=99999"],
        "cannot be served: --max-model-len 99999 is more than the model's 1024 positions",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_at_a_start_is_one_sentence_that_names_it(
    serve: Callable[..., Result], tmp_path: Path, name: str
) -> None:
    (tmp_path / "file").touch()
    with socket.socket() as taken, socket.socket() as closed:
        for sock in (taken, closed):
            sock.bind(("127.0.0.1", 0))
        taken.listen()
        facts = {"tmp": tmp_path, "port": taken.getsockname()[1], "closed": closed.getsockname()[1]}
        options, sentence = WRONG[name]
        found = serve(*(option.format(**facts) for option in options))
    assert found.exit_code in (1, 2)
    (said,) = found.stderr.splitlines()
    assert said.startswith("flexgate: ")
    assert said.endswith(sentence.format(**facts))
