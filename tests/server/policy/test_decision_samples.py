"""Decisions are recorded without anything that a client wrote, and shared through the store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from flexgate.policies.decision import DecisionRequest
from flexgate.policies.errors import (
    ContextRefused,
    DecisionRefused,
    EmptyGate,
    ExpertDenied,
    ExpertRequired,
    GradeTooLow,
    LayerWithoutExpert,
    RequiredExpertMissing,
    StoreUnavailable,
    TenantArchived,
    UnknownExpert,
    UnknownTenant,
)
from flexgate.policies.store import Store
from flexgate.policies.store.decision_samples import replays
from flexgate.server.policy import decision_samples
from flexgate.server.policy.decision_samples import DecisionSamples


def _asked(store: Store) -> dict[tuple[Any, ...], int]:
    return {(r.tenant_id, r.request.only, r.request.ignore): r.times for r in replays(store.engine, 9.0)}


def _request(**fields: Any) -> DecisionRequest:
    return DecisionRequest(decision_id="d", **fields)


def test_what_several_processes_recorded_adds_up_in_the_store(real_store: Store) -> None:
    for times in (2, 3):
        process = DecisionSamples(real_store)
        for number in range(times):
            process.add("t", _request(only=("news", "math", "news")[number % 2 :]), float(number))
        process.close()
    assert _asked(real_store) == {("t", ("math", "news"), ()): 5}


def test_replays_come_as_if_asked_now(real_store: Store) -> None:
    process = DecisionSamples(real_store)
    process.add("t", _request(purpose="search", region="DE"), 1.0)
    process.flush()
    (replay,) = replays(real_store.engine, 9.0)
    assert (replay.now, replay.request.purpose, replay.request.region) == (9.0, "search", "DE")


def test_more_of_a_tenant_than_fits_before_writing_forgets_its_oldest(
    real_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decision_samples, "MAX_WAITING_OF_ONE", 2)
    process = DecisionSamples(real_store)
    process.add("quiet", _request(purpose="x-a"), 0.0)
    for purpose in ("x-a", "x-b", "x-a", "x-c"):
        process.add("t", _request(purpose=purpose), 1.0)
    process.flush()
    kept = {(r.tenant_id, r.request.purpose, r.times) for r in replays(real_store.engine, 9.0)}
    assert kept == {("quiet", "x-a", 1), ("t", "x-a", 2), ("t", "x-c", 1)}


def test_a_store_that_fails_loses_the_record_and_nothing_else(
    real_store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise StoreUnavailable("locked")

    process = DecisionSamples(real_store)
    process.add("t", _request(), 1.0)
    monkeypatch.setattr(decision_samples, "add_samples", fail)
    process.close()
    assert "StoreUnavailable" in caplog.text
    monkeypatch.undo()
    process.add("t", _request(), 2.0)
    process.close()
    assert _asked(real_store) == {("t", None, ()): 1}


RECORDED = {EmptyGate, ExpertDenied, ExpertRequired, GradeTooLow, LayerWithoutExpert, RequiredExpertMissing}
NOT_RECORDED = {ContextRefused, TenantArchived, UnknownExpert, UnknownTenant}


def test_a_refusal_is_recorded_unless_it_names_what_is_not_there(real_store: Store) -> None:
    assert set(DecisionRefused.__subclasses__()) == RECORDED | NOT_RECORDED
    process = DecisionSamples(real_store)
    for kind in RECORDED | NOT_RECORDED:
        error = kind("no", reasons=(), param="p") if kind is ExpertDenied else kind("no")
        process.add_refused("t", _request(ignore=(kind.__name__,)), error, 1.0)
    process.close()
    assert {name for _, _, (name,) in _asked(real_store)} == {kind.__name__ for kind in RECORDED}


@pytest.mark.asyncio
async def test_allowed_and_denied_requests_are_recorded_and_no_text_of_the_client_is(
    services: Any, make_client: Callable[..., httpx.AsyncClient], real_store: Store
) -> None:
    bodies = [
        ({"experts": {"only": ["news"]}}, None),  # admitted; no model answers here
        ({"experts": {"only": ["math"]}}, 403),
        ({"experts": {"only": ["kittiwake-nonsense"]}}, 404),
        ({"experts": {"only": ["secret"]}}, 404),
        ({"purpose": "x-kittiwake"}, 400),
    ]
    async with make_client("sk-t") as http:
        for extension, status in bodies:
            body = {"prompt": "the kittiwake nests", "flexgate": extension, "user": "kittiwake"}
            answer = await http.post("/v1/completions", json=body)
            assert status in (None, answer.status_code), answer.text
    services.samples.flush()
    assert _asked(real_store) == {("t", ("news",), ()): 1, ("t", ("math",), ()): 1}
    folder = Path(str(real_store.engine.url.database)).parent
    assert b"kittiwake" not in b"".join(path.read_bytes() for path in folder.iterdir())
