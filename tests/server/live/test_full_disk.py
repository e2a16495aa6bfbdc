"""A real server whose disk is full to the last byte still takes rights away, for good, and gives none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import live_server
import pytest
from smalldisk import SmallDisk, mounted

from flexgate.policies.store.store import Store

pytestmark = [pytest.mark.engine, pytest.mark.slow]

PRESS = "/v1/organization/projects/proj_press"
ADMIN_KEYS = "/v1/organization/admin_api_keys"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with mounted(tmp_path / "disk", 64) as disk:
        yield disk


def ask(server: Any, key: str, *experts: str) -> tuple[int, str | None]:
    """Status and code of a request that names experts."""
    body = {"model": "tiny", "prompt": "x", "max_tokens": 2, "flexgate": {"experts": {"only": experts}}}
    with server.client(key) as http:
        answer = http.post("/v1/completions", json=body)
    return answer.status_code, answer.json().get("error", {}).get("code")


def take(http: Any, method: str, path: str, body: Any = None) -> None:
    answer = http.request(method, f"{path}?wait=all", json=body)
    assert answer.status_code == 200, answer.text


def test_rights_are_taken_away_on_a_full_disk_and_none_is_given(
    text_checkpoint: Path, tmp_path: Path, disk: SmallDisk
) -> None:
    server = live_server.start(text_checkpoint, disk.path, log=tmp_path / "server.log")
    try:
        assert [ask(server, *who) for who in (("all", "news"), ("all", "math"), ("press", "news"))] == [(200, None)] * 3
        disk.fill()
        with server.client("admin") as http:
            refused = http.post("/v1/organization/projects", json={"name": "new"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (507, "disk_full")
            take(http, "POST", f"{PRESS}/expert_permissions", {"mode": "allow_list", "expert_ids": []})
            assert ask(server, "press", "news") == (403, "expert_policy_denied")
            take(http, "DELETE", "/v1/agreements/a-news")
            assert ask(server, "all", "news") == (403, "expert_policy_denied")
            record = http.delete("/v1/experts/math")
            assert record.status_code == 200, record.text
            assert ask(server, "all", "math")[0] in (403, 404)
            (key,) = http.get(f"{PRESS}/api_keys").json()["data"]
            take(http, "DELETE", f"{PRESS}/api_keys/{key['id']}")
            assert ask(server, "press") == (401, "invalid_api_key")
            (owner,) = [k for k in http.get(ADMIN_KEYS).json()["data"] if k["owner"]["role"] == "owner"]
            take(http, "DELETE", f"{ADMIN_KEYS}/{owner['id']}")
        assert live_server.stop(server) == 0
    finally:
        if server.process.poll() is None:
            live_server.stop(server)
    disk.free()
    with closing(Store.open(f"sqlite:///{server.database}")) as store:
        assert store.verify_audit().heads == store.audit_heads()
        assert "weights.cleared" in [entry.action for entry in store.audit_log(limit=1000)]
    server = live_server.start(text_checkpoint, disk.path, log=tmp_path / "again.log")
    try:
        assert ask(server, "all", "news") == (403, "expert_policy_denied")
        assert ask(server, "all", "math")[0] in (403, 404)
        assert ask(server, "press") == (401, "invalid_api_key")
        assert ask(server, "all", "public") == (200, None)
    finally:
        live_server.stop(server)
