"""A checkpoint whose owners have several experts, other ones in each layer: assigned, served, gated and explained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from live_server import LiveServer, seed_store, start, stop
from text_checkpoint import EXPERTS, write_checkpoint
from typer.testing import CliRunner

from flexgate.experts.cli.main import app

pytestmark = [pytest.mark.engine, pytest.mark.slow]
UNITS = """ownership: owners
units:
- {id: public, owner: commons, domain: general, experts: [{layers: 0, experts: 0}]}
- id: news
  owner: gazette
  domain: news
  grade: removed
  experts: [{layers: 0, experts: 1-2}, {layers: 1, experts: 3-4}]
- id: math
  owner: academy
  domain: math
  grade: shared
  experts: [{layers: 0, experts: 3-4}, {layers: 1, experts: 0-2}]
"""
BODY = {"model": "tiny", "prompt": "the quick brown fox", "max_tokens": 6, "temperature": 0}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """`public` has nothing in the second layer."""
    place = tmp_path_factory.mktemp("units")
    model = write_checkpoint(place / "model")
    (place / "units.yaml").write_text(UNITS)
    assigned = CliRunner().invoke(app, ["assign", str(model), "--units", str(place / "units.yaml"), "--force"])
    assert assigned.exit_code == 0, assigned.output
    seed_store(f"sqlite:///{place / 'flexgate.db'}", EXPERTS)
    running = start(model, place)
    yield running
    stop(running)


def ask(server: LiveServer, who: str, **more: Any) -> Any:
    with server.client(who) as http:
        return http.post("/v1/completions", json={**BODY, **more}).json()


def test_a_model_that_was_assigned_is_served_by_its_units(server: LiveServer) -> None:
    answers = {who: ask(server, who) for who in ("all", "press")}
    assert answers["all"]["flexgate"]["allowed"] == ["public", "news", "math"]
    assert answers["press"]["flexgate"]["allowed"] == ["public", "news"]
    excluded = {one["expert"]: one["grade"] for one in answers["press"]["flexgate"]["excluded"]}
    assert excluded == {"math": "shared", "code": "unknown"}
    parts = {one["id"]: one for one in answers["press"]["flexgate"]["attribution"]["experts"]}
    assert (parts["math"]["gate_mass"], parts["math"]["tokens"], parts["math"]["grade"]) == (0.0, 0, "shared")
    assert (parts["news"]["tokens"] > 0, parts["news"]["owner"]) == (True, "gazette")
    again = [ask(server, who)["choices"][0]["text"] for who in ("press", "all", "press")]
    assert again == [answers[who]["choices"][0]["text"] for who in ("press", "all", "press")]
    with server.client("press") as http:
        cards = http.get("/v1/experts").json()["data"]
    assert {card["id"]: card["grade"] for card in cards if card["live"]} == {
        "public": "unknown",
        "news": "removed",
        "math": "shared",
    }


def test_a_project_whose_units_leave_a_layer_without_an_expert_is_told_why(server: LiveServer) -> None:
    refused = ask(server, "public")["error"]
    with server.client("public") as http:
        explained = http.get("/v1/policy/explain").json()
    assert refused["code"] == "layer_without_expert"
    assert explained["refusal"] == {"code": "layer_without_expert", "message": refused["message"]}
    with server.client("press") as http:
        assert http.get("/v1/policy/explain").json()["refusal"] is None
    only_public = ask(server, "all", flexgate={"experts": {"only": []}})
    assert only_public["error"]["code"] == "layer_without_expert"
