"""Heads are appended to a file outside, and both verifications take it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flexgate.policies.audit import Event
from flexgate.policies.store import Store
from flexgate.server.cli.main import app
from flexgate.server.ledger.receipts.heads import Heads


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "outside.jsonl"


@pytest.fixture
def heads(kit: Any, real_store: Store, file: Path) -> Heads:
    kit.made(1)
    return Heads(real_store, kit.path, file, seconds=1.0)


def lines(file: Path) -> list[tuple[str, int]]:
    found = [json.loads(line) for line in file.read_text().splitlines()]
    return [(head["log"], head["sequence"]) for head in found]


def test_what_is_new_is_appended_and_nothing_twice(heads: Heads, kit: Any, real_store: Store, file: Path) -> None:
    heads.append()
    heads.append()
    first = lines(file)
    assert [log for log, _ in first] == ["changes", "receipts"]
    kit.record(2)
    kit.maker().work()
    heads.append()
    assert lines(file) == [*first, ("receipts", 2)]
    real_store.record([Event(at=1.0, actor="a", action="x.y", detail={})])
    heads.append()
    assert lines(file)[-1] == ("changes", first[0][1] + 1)


def test_a_file_that_takes_nothing_is_tried_again(heads: Heads, file: Path, caplog: pytest.LogCaptureFixture) -> None:
    file.mkdir()
    heads.append()
    heads.append()
    assert caplog.text.count("heads cannot be appended to") == 1
    file.rmdir()
    heads.append()
    assert len(lines(file)) == 2


def test_a_line_that_was_written_in_part_costs_no_other(
    heads: Heads, kit: Any, real_store: Store, file: Path, tmp_path: Path
) -> None:
    torn = '{"log": "receipts", "server": "srv_'
    file.write_text(torn)
    heads.append()
    whole = file.read_text()
    assert [json.loads(line)["log"] for line in whole.splitlines()] == ["changes", "receipts"]  # the rest is cut off
    file.write_text(f"{torn}\n{whole}")  # as where the file may only be appended to
    place = ["--database-url", real_store.engine.url.render_as_string()]
    found = CliRunner().invoke(app, ["audit", "verify", "--heads", str(file), *place])
    assert "it contains 1 of 1 given heads" in found.output
    assert "1 line is broken off and was left out" in found.stderr
    receipts = kit.receipts(kit.maker())
    chain, jwks = tmp_path / "chain.jsonl", tmp_path / "jwks.json"
    chain.write_text("".join(json.dumps(one, separators=(",", ":")) + "\n" for one in receipts.chain(0, 10)))
    jwks.write_bytes(receipts.jwks)
    found = CliRunner().invoke(app, ["receipts", "verify", str(chain), "--jwks", str(jwks), "--heads", str(file)])
    assert "1 of 1 heads are of the batches that were given" in found.output
    assert "1 line is broken off and was left out" in found.stderr


def test_the_file_is_what_both_verifications_take(
    heads: Heads, kit: Any, real_store: Store, file: Path, tmp_path: Path
) -> None:
    heads.append()
    place = ["--database-url", real_store.engine.url.render_as_string()]
    found = CliRunner().invoke(app, ["audit", "verify", "--heads", str(file), *place])
    assert "it contains 1 of 1 given heads" in found.output
    receipts = kit.receipts(kit.maker())
    chain, jwks = tmp_path / "chain.jsonl", tmp_path / "jwks.json"
    chain.write_text("".join(json.dumps(one, separators=(",", ":")) + "\n" for one in receipts.chain(0, 10)))
    jwks.write_bytes(receipts.jwks)
    command = ["receipts", "verify", str(chain), "--jwks", str(jwks), "--heads", str(file)]
    found = CliRunner().invoke(app, command)
    assert "1 of 1 heads are of the batches that were given" in found.output
    forged = file.read_text().replace('"sequence": 1, "hash": "', '"sequence": 1, "hash": "0')
    file.write_text(forged)
    assert CliRunner().invoke(app, command).exit_code == 1
