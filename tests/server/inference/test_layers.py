"""Requests whose experts leave a layer of the model without any."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from flexgate.server.engine.protocol.slots import SlotMap

pytestmark = pytest.mark.asyncio

PATH = "/v1/completions"


@pytest.fixture
def client(services: Any, client: httpx.AsyncClient) -> httpx.AsyncClient:
    """Its second layer has experts of `news` alone."""
    slots = {info.id: info.slot for info in services.client.experts()}
    layers = bytes(range(len(slots))), bytes([slots["news"]]) * len(slots)
    services.client.slot_map = SlotMap(len(slots), layers)
    return client


async def test_experts_that_leave_a_layer_without_any_are_refused_before_the_engine(
    client: httpx.AsyncClient, handler: Any
) -> None:
    body = {"prompt": "x", "flexgate": {"experts": {"ignore": ["news"]}}}
    response = await client.post(PATH, json=body)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (403, "layer_without_expert")
    assert "leave a layer of the model without any" in error["message"]
    assert not handler.seen


async def test_experts_with_one_for_every_layer_reach_the_engine(client: httpx.AsyncClient, handler: Any) -> None:
    await client.post(PATH, json={"prompt": "x", "flexgate": {"experts": {"only": ["news"]}}})
    assert len(handler.seen) == 1
