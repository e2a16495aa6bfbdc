"""`flexgate audit`: tampering is found, in the database and in an export."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from flexgate.policies.audit import DENIED, Event, from_line
from flexgate.policies.store import Store

Run = Callable[..., Any]


@pytest.fixture
def heads(flexgate: Run, tmp_path: Path) -> Path:
    """Two heads kept outside, with changes before, between and after."""
    path = tmp_path / "heads.jsonl"
    lines = []
    for name in ("one", "two"):
        lines.append(flexgate("audit", "head").output)
        flexgate("tenants", "create", name)
    path.write_text("".join(lines))
    return path


def test_an_untouched_log_is_verified(flexgate: Run, heads: Path) -> None:
    found = flexgate("audit", "verify", "--heads", str(heads))
    assert found.exit_code == 0
    assert "it contains 2 of 2 given heads" in found.output


def test_an_export_is_the_log_and_is_verified_without_a_database(
    flexgate: Run, heads: Path, real_store: Store, tmp_path: Path
) -> None:
    exported = flexgate("audit", "export").output
    assert [from_line(line) for line in exported.splitlines()] == real_store.audit_log(limit=1000)
    path = tmp_path / "export.jsonl"
    path.write_text(exported)
    assert flexgate("audit", "verify", "--file", str(path), "--heads", str(heads)).exit_code == 0
    path.write_text(exported.replace('"name":"two"', '"name":"too"'))
    found = flexgate("audit", "verify", "--file", str(path))
    assert found.exit_code == 1
    assert "was changed after it was written" in found.stderr
    assert len(flexgate("audit", "export", "--after", "3").output.splitlines()) == len(exported.splitlines()) - 3


@pytest.mark.parametrize(
    ("tampering", "said"),
    [
        ("UPDATE audit_log SET actor = 'nobody' WHERE sequence = 2", "entry 2 was changed"),
        ("DELETE FROM audit_log WHERE sequence = 2", "entry 3 follows entry 1"),
        ("DELETE FROM audit_log WHERE sequence > 3", "was truncated or rewritten"),
        (
            """UPDATE audit_log SET detail = replace(detail, '{"policy_version"', '{"note": "x", "policy_version"')""",
            "the key 'note' is given twice",
        ),
    ],
)
def test_tampering_is_found(flexgate: Run, heads: Path, real_store: Store, tampering: str, said: str) -> None:
    with real_store.engine.begin() as connection:
        connection.execute(sa.text(tampering))
    found = flexgate("audit", "verify", "--heads", str(heads))
    assert found.exit_code == 1
    assert said in found.stderr


def test_an_older_head_that_is_missing_is_found_too(flexgate: Run, heads: Path) -> None:
    lines = heads.read_text().splitlines()
    forged = {**json.loads(lines[0]), "hash": "f" * 64}
    heads.write_text("\n".join([json.dumps(forged), lines[1]]))
    found = flexgate("audit", "verify", "--heads", str(heads))
    assert found.exit_code == 1
    assert f"does not contain the entry {forged['sequence']}" in found.stderr


def test_what_is_no_head_is_refused(flexgate: Run, heads: Path) -> None:
    heads.write_text("{}\n")
    found = flexgate("audit", "verify", "--heads", str(heads))
    assert found.exit_code == 1
    assert "this line is not output of 'flexgate audit head'" in found.stderr


def test_a_key_put_twice_into_an_export_is_found(flexgate: Run, tmp_path: Path) -> None:
    path = tmp_path / "export.jsonl"
    path.write_text(flexgate("audit", "export").output.replace('{"action"', '{"actor":"nobody","action"', 1))
    found = flexgate("audit", "verify", "--file", str(path))
    assert found.exit_code == 1
    assert "not an audit entry" in found.stderr


@pytest.mark.parametrize("content", ["", "\n\n", '{"sequence": 0, "hash": "%s"}\n' % ("0" * 64)])
def test_a_file_without_a_head_is_not_praised(flexgate: Run, heads: Path, content: str) -> None:
    heads.write_text(content)
    found = flexgate("audit", "verify", "--heads", str(heads))
    assert found.exit_code == 1
    assert "contains no head: give a file with the output of" in found.stderr


def test_without_heads_nothing_is_said_of_what_cannot_be_known(flexgate: Run) -> None:
    found = flexgate("audit", "verify")
    assert found.exit_code == 0
    assert "verified" not in found.output
    assert "without --heads, a replaced or truncated log is not detected" in found.output


def test_old_denied_requests_are_trimmed_and_the_log_is_verified_with_heads_from_before(
    flexgate: Run, heads: Path, real_store: Store, tmp_path: Path
) -> None:
    for days in (3, 2, 1, 0):
        at = time.time() - days * 86_400
        real_store.record([Event(at=at, actor="anonymous", action=DENIED, detail={"requests": 5})])
        with heads.open("a") as file:
            file.write(flexgate("audit", "head").output)
    assert flexgate("audit", "trim", "--older-than-days", "2").output.strip() == "2"
    found = flexgate("audit", "verify", "--heads", str(heads))
    assert found.exit_code == 0
    assert "2 entries of denied requests were trimmed, as recorded in the log" in found.output
    assert "1 of the given heads are trimmed entries and cannot be checked" in found.output
    path = tmp_path / "export.jsonl"
    path.write_text(flexgate("audit", "export").output)
    assert flexgate("audit", "verify", "--file", str(path), "--heads", str(heads)).output == found.output
    assert flexgate("audit", "trim", "--older-than-days", "0").exit_code == 2


def test_heads_of_both_logs_are_printed(flexgate: Run, real_store: Store) -> None:
    def logs() -> list[str]:
        return [json.loads(line)["log"] for line in flexgate("audit", "head").output.splitlines()]

    assert logs() == ["changes"]
    real_store.record([Event(at=1.0, actor="anonymous", action=DENIED, detail={})])
    assert [json.loads(line)["log"] for line in flexgate("audit", "head").output.splitlines()] == [
        "changes",
        "requests",
    ]


@pytest.mark.parametrize("option", ["--url", "--key", "--database-url", "--state-dir", "--demo"])
def test_an_export_and_another_place_are_not_verified_at_once(flexgate: Run, tmp_path: Path, option: str) -> None:
    path = tmp_path / "export.jsonl"
    path.write_text(flexgate("audit", "export").output)
    value = {"--demo": (), "--url": ("http://127.0.0.1:1",)}.get(option, ("x",))
    found = flexgate("audit", "verify", "--file", str(path), option, *value)
    assert (found.exit_code, found.stdout) == (2, "")
    assert f"give either --file or {option}, not both" in found.stderr
