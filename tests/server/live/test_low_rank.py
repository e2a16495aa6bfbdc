"""A low-rank expert in a running server: added to a slot of its own, answering, graded, started again, revoked."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import live_server as live
import pytest
from packagekit import statement

from flexgate.experts.package.extract import extract_expert
from flexgate.experts.package.size import ExpertSize

pytestmark = [pytest.mark.engine, pytest.mark.slow]

SLOTS = ("--allow-unsigned-experts", "--slots", "full=1,r4=1", "--moe-kernels", "flexgate")
BODY = {"prompt": "the quick brown fox jumps", "max_tokens": 6, "temperature": 0, "logprobs": 2}
ONLY = {"flexgate": {"experts": {"only": ["low"]}}}


def package(model: Path, target: Path, rank: int) -> Path:
    """The checkpoint's expert `code` at a rank, as `low` of another owner."""
    extract_expert(model, "code", target, statement=statement("low", "acme"), size=ExpertSize(rank=rank))
    return target


def add(server: Any, path: Path) -> dict[str, Any]:
    """`flexgate experts add` against the server; what it printed."""
    command = [live._script(), "experts", "add", path, "--json", "--url", server.url, "--key", server.key("admin")]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
    said: dict[str, Any] = json.loads(run.stdout)
    return said


def ask(server: Any, **more: Any) -> dict[str, Any]:
    with server.client("all") as http:
        answer: dict[str, Any] = http.post("/v1/completions", json={**BODY, **more}).json()
    return answer


def grades(server: Any) -> dict[str, str]:
    with server.client("admin") as http:
        return {expert["id"]: expert["grade"] for expert in http.get("/v1/experts").json()["data"]}


def test_a_low_rank_expert_is_added_answers_comes_back_and_goes(text_checkpoint: Path, tmp_path: Path) -> None:
    permit = {"id": "a-low", "owner": "acme", "experts": ["low"], "assignee": "everyone", "effect": "permit"}
    server = live.start(text_checkpoint, tmp_path, *SLOTS)
    try:
        assert "1 of rank 4" in server.log.read_text()
        refused = add(server, package(text_checkpoint, tmp_path / "larger", 5))
        assert "No slot has room for an expert of rank 5" in json.dumps(refused)
        assert add(server, package(text_checkpoint, tmp_path / "low", 4))["live"] == "low"
        with server.client("admin") as http:
            assert http.post("/v1/agreements", params={"wait": "all"}, json=permit).status_code == 200
        first = ask(server, **ONLY)
        assert first["flexgate"]["allowed"] == ["public", "low"]
        shares = {part["id"]: part["share_ppm"] for part in first["flexgate"]["attribution"]["experts"]}
        assert shares["low"] > 0
        assert grades(server)["low"] == "removed"
    finally:
        assert live.stop(server) == 0
    server = live.start(text_checkpoint, tmp_path, *SLOTS)
    try:
        assert ask(server, **ONLY)["choices"] == first["choices"]
        with server.client("admin") as http:
            assert http.delete("/v1/experts/low").status_code == 200
        assert "low" not in ask(server)["flexgate"]["allowed"]
    finally:
        assert live.stop(server) == 0
