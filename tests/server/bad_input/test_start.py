"""A start that is refused: before vLLM is loaded, and with nothing used up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

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
