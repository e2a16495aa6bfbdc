"""Experts added to and revoked from a running server, through HTTP and the command."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import live_server as live
import psutil
import pytest
from packagekit import statement

from flexgate.experts.package.extract import extract_expert
from flexgate.policies.store.store import Store
from flexgate.server.experts.repository import Added, WeightsRepository

pytestmark = [pytest.mark.engine, pytest.mark.slow]

BODY = {"prompt": "the quick brown fox jumps", "max_tokens": 8, "temperature": 0, "logprobs": 2}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("changing")


@pytest.fixture(scope="module")
def changing(text_checkpoint: Path, place: Path) -> Iterator[Any]:
    """A server of this module's own, whose experts change."""
    server = live.start(text_checkpoint, place, "--allow-unsigned-experts")
    yield server
    assert live.stop(server) == 0


@pytest.fixture(scope="module")
def package(text_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint's expert `code` once more, as `extra` of another owner."""
    target = tmp_path_factory.mktemp("package") / "extra"
    extract_expert(text_checkpoint, "code", target, statement=statement("extra", "acme"))
    return target


def command(server: Any, *arguments: str, key: str = "admin") -> Any:
    """`flexgate experts …` against the server; the JSON that it printed."""
    run = subprocess.run(
        [live._script(), "experts", *arguments, "--json", "--url", server.url, "--key", server.key(key)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    return json.loads(run.stdout)


def ask(server: Any, who: str = "all", **more: Any) -> dict[str, Any]:
    with server.client(who) as http:
        answer: dict[str, Any] = http.post("/v1/completions", json={**BODY, **more}).json()
    return answer


def permit(server: Any) -> None:
    terms = {"id": "a-extra", "owner": "acme", "experts": ["extra"], "assignee": "everyone", "effect": "permit"}
    with server.client("admin") as http:
        if http.get("/v1/agreements/a-extra").status_code == 200:
            return  # agreements outlive what they are about
        response = http.post("/v1/agreements", params={"wait": "all"}, json=terms)
    assert response.status_code == 200, response.text


def test_an_expert_comes_dark_is_permitted_answers_and_goes(changing: Any, package: Path) -> None:
    asking = {"flexgate": {"experts": {"only": ["extra"]}}, "cache_salt": "same"}
    assert ask(changing, **asking)["error"]["code"] == "expert_not_found"
    added = command(changing, "add", str(package))
    assert added["live"] == "extra"
    assert ask(changing, **asking)["error"]["code"] == "expert_policy_denied"
    permit(changing)
    with_extra = ask(changing, **asking)
    assert with_extra["flexgate"]["allowed"] == ["public", "extra"]
    assert with_extra["flexgate"]["weights_epoch"] == added["weights_epoch"]
    with_code = ask(changing, flexgate={"experts": {"only": ["code"]}})
    assert with_extra["choices"] == with_code["choices"]
    record = command(changing, "revoke", "extra")
    assert record["object"] == "expert.revocation"
    assert ask(changing, **asking)["error"]["code"] == "expert_policy_denied"
    assert "extra" not in ask(changing)["flexgate"]["allowed"]


def test_a_stream_ends_with_its_reason_and_nothing_comes_after_the_answer(changing: Any, package: Path) -> None:
    command(changing, "add", str(package))
    permit(changing)
    events: list[tuple[float, str]] = []

    def read() -> None:
        body = {**BODY, "max_tokens": 400, "stream": True, "ignore_eos": True}
        body["flexgate"] = {"experts": {"only": ["extra"]}}
        with changing.client("all") as http, http.stream("POST", "/v1/completions", json=body) as response:
            events.extend((time.monotonic(), line) for line in response.iter_lines() if line)

    reader = threading.Thread(target=read)
    reader.start()
    while len(events) < 5:
        time.sleep(0.01)
    with changing.client("admin") as http:
        record = http.delete("/v1/experts/extra").json()
    answered = time.monotonic()
    reader.join(30)
    errors = [json.loads(line[6:])["error"] for _, line in events if '"error"' in line]
    assert [error["code"] for error in errors] == ["expert_revoked"]
    assert events[-1][1] == "data: [DONE]"
    tokens = [at for at, line in events if '"text"' in line]
    assert 5 <= len(tokens) < 400
    assert max(tokens) < answered
    assert record["aborted_requests"] == 1
    assert record["undelivered_responses"] == 0


def require(server: Any, place: Path, *experts: str) -> None:
    """What an operator's policy file says, once the running server has learnt of it."""
    (place / "policy.yaml").write_text(f"format: flexgate-policy/v1\nrequired_experts: [{', '.join(experts)}]\n")
    database = f"--database-url=sqlite:///{server.database}"
    command = [live._script(), "policy", "apply", place / "policy.yaml", database]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    with server.client("admin") as http:
        version = http.get("/v1/policy/revisions").json()["data"][0]["version"]
    deadline = time.monotonic() + 60
    while "flexgate" not in ask(server, max_tokens=1, flexgate={"min_policy_version": version}):
        assert time.monotonic() < deadline


def test_a_required_expert_is_in_every_answer_and_its_revocation_ends_them_all(
    changing: Any, package: Path, place: Path
) -> None:
    command(changing, "add", str(package))
    permit(changing)
    require(changing, place, "extra")
    only: dict[str, Any] = {"flexgate": {"experts": {"only": ["news"]}}}
    assert ask(changing, "press", **only)["flexgate"]["allowed"] == ["public", "news", "extra"]
    ignoring = ask(changing, flexgate={"experts": {"ignore": ["extra"]}})
    assert ignoring["error"]["code"] == "expert_required"
    with changing.client("press") as http, changing.client("admin") as admin:
        body = {**BODY, **only, "max_tokens": 900, "stream": True, "ignore_eos": True}
        with http.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            admin.delete("/v1/experts/extra").raise_for_status()
            ended = [json.loads(line[6:])["error"] for line in lines if '"error"' in line]
    assert [error["code"] for error in ended] == ["expert_revoked"]
    for who in ("all", "press", "public"):
        assert ask(changing, who)["error"]["code"] == "required_expert_missing"
    require(changing, place)
    assert "extra" not in ask(changing)["flexgate"]["allowed"]


def test_only_an_administrator_and_the_owner_may_revoke(changing: Any) -> None:
    for who, status in (("all", 403), ("auditor", 403), ("owner", 404)):
        with changing.client(who) as http:
            response = http.delete("/v1/experts/math")
        assert response.status_code == status, (who, response.text)
    with changing.client("owner") as http:
        assert http.delete("/v1/experts/math").content == http.delete("/v1/experts/nonsense").content
        assert http.delete("/v1/experts/public").status_code == 404


def test_a_broken_upload_goes_on_where_it_was(changing: Any, package: Path) -> None:
    data = {path.name: path.read_bytes() for path in package.iterdir()}
    with changing.client("admin") as http:
        opened = http.post("/v1/expert_uploads", json={"files": {name: len(part) for name, part in data.items()}})
        upload = opened.json()["id"]
        url = f"/v1/expert_uploads/{upload}"
        half = len(data["expert.safetensors"]) // 2
        http.patch(f"{url}/expert.safetensors", params={"offset": 0}, content=data["expert.safetensors"][:half])
        early = http.post("/v1/experts", json={"upload": upload})
        assert (early.status_code, early.json()["error"]["code"]) == (409, "upload_incomplete")
        wrong = http.patch(f"{url}/expert.safetensors", params={"offset": 3}, content=b"x")
        assert (wrong.status_code, wrong.json()["received"]) == (409, half)
        too_much = http.patch(f"{url}/manifest.json", params={"offset": 0}, content=bytes(1 << 20))
        assert too_much.status_code == 413
        http.patch(f"{url}/expert.safetensors", params={"offset": half}, content=data["expert.safetensors"][half:])
        received = http.get(url).json()["files"]["manifest.json"]["received"]
        rest = data["manifest.json"][received:]
        done = http.patch(f"{url}/manifest.json", params={"offset": received}, content=rest).json()
        assert all(file["received"] == file["bytes"] for file in done["files"].values())
    with changing.client("all") as http:
        assert http.get(url).status_code == 403
    with changing.client("owner") as http:
        assert http.get(url).status_code == 404


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"package": "../../etc"}, 400, "invalid_value"),
        ({"package": "extra"}, 400, "no_experts_dir"),
        ({"upload": "upload_000000000000000000000000"}, 404, "upload_not_found"),
        ({"upload": "../x"}, 404, "upload_not_found"),
        ({}, 400, "invalid_value"),
        ({"package": "a", "upload": "b"}, 400, "invalid_value"),
        ({"path": "/etc/passwd"}, 400, "unknown_parameter"),
    ],
)
def test_what_is_no_package_is_refused(changing: Any, body: dict[str, str], status: int, code: str) -> None:
    with changing.client("admin") as http:
        response = http.post("/v1/experts", json=body)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code), response.text


def test_a_restart_comes_back_to_the_last_answer(text_checkpoint: Path, tmp_path: Path, package: Path) -> None:
    """Killed, not stopped, after a revocation and an addition. The engine goes with its server."""
    first = live.start(text_checkpoint, tmp_path, "--allow-unsigned-experts")
    record = command(first, "revoke", "news")
    command(first, "add", str(package))
    permit(first)
    before = ask(first, flexgate={"experts": {"only": ["extra"]}})
    family = live.family(first)
    first.process.kill()
    first.process.wait(30)
    _, alive = psutil.wait_procs(family, timeout=30)
    for process in alive:
        process.kill()
    assert not alive
    second = live.start(text_checkpoint, tmp_path, "--allow-unsigned-experts")
    try:
        after = ask(second, flexgate={"experts": {"only": ["extra"]}})
        assert after["choices"] == before["choices"]
        assert after["flexgate"]["weights_epoch"] == record["weights_epoch"] + 1
        assert ask(second)["flexgate"]["allowed"] == ["public", "math", "code", "secret", "extra"]
    finally:
        assert live.stop(second) == 0
    store = Store.open(f"sqlite:///{first.database}")
    assert store.weights().revoked == {"news"}
    store.close()


def test_a_start_says_that_the_checkpoint_holds_a_newer_version_than_a_package_and_serves_it(
    text_checkpoint: Path, tmp_path: Path
) -> None:
    """Of `secret`, which is merged in version 2 and was added in version 1."""
    model = shutil.copytree(text_checkpoint, tmp_path / "model")
    manifest = json.loads((model / "flexgate.json").read_text())
    manifest["experts"][4]["version"] = 2
    (model / "flexgate.json").write_text(json.dumps(manifest))
    live.seed_store(f"sqlite:///{tmp_path / 'flexgate.db'}", live.experts_of(model))
    older = tmp_path / "experts" / "job_1"
    made = extract_expert(model, "code", older, statement=statement("secret", "vault"))
    store = Store.open(f"sqlite:///{tmp_path / 'flexgate.db'}")
    added = Added("secret", 1, 5, 2, older.name, made.weights.digest, made.base.digest)
    WeightsRepository(store).add(made, added, actor="key_admin", at=time.time())
    store.close()
    server = live.start(model, tmp_path, "--allow-unsigned-experts")
    try:
        of_secret, of_code = (ask(server, flexgate={"experts": {"only": [who]}}) for who in ("secret", "code"))
    finally:
        assert live.stop(server) == 0
    assert of_secret["flexgate"]["allowed"] == ["public", "secret"]
    assert of_secret["choices"] != of_code["choices"]
    sentence = "added package secret version 1: the checkpoint's version 2 is newer and is served"
    lines = [line for line in server.log.read_text().splitlines() if sentence in line]
    assert len(lines) == 2
    assert any(line.startswith("set aside  ") for line in lines)
