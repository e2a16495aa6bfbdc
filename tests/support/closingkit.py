"""Months of one owner's usage, and their closings."""

from __future__ import annotations

import asyncio
from typing import Any

from flexgate.server.ledger.entries import COMPLETED, RegisteredExpert, Registration, Used, microseconds

START = 1_793_491_200.0  # 2026-11-01
DECEMBER, JANUARY, FEBRUARY = START + 30 * 86_400, START + 61 * 86_400, START + 92 * 86_400
NEWS = RegisteredExpert(0, "news", "gazette", "a-news", 2)
PAID = [{"kind": "compensate", "rate": "0.125", "currency": "EUR", "unit": "request"}]
RECEIPT = f"dec_{1:032x}"
MINIMUM = {"amount": "1", "currency": "EUR"}
BODY = {"owner_id": "gazette", "minimums": [MINIMUM]}


async def close(call: Any, month: str, **changes: Any) -> Any:
    return await call("sk-admin", "POST", f"/v1/statements/{month}/closing", json={**BODY, **changes})


async def correct(call: Any, amount: str, id_: str = "c") -> None:
    body = {"kind": "correction", "id": id_, "owner_id": "gazette", "receipt_id": RECEIPT, "reason": "forgotten"}
    added = await call("sk-admin", "POST", "/v1/corrections", json={**body, "amount": amount, "currency": "EUR"})
    assert added.status_code == 201, added.text


def payout(carried: str, total: str, due: str, carried_on: str, minimum: str = "1") -> dict[str, str]:
    return {
        "currency": "EUR",
        "carried": carried,
        "total": total,
        "minimum": minimum,
        "due": due,
        "carried_on": carried_on,
    }


async def use(services: Any, number: int, expert: RegisteredExpert = NEWS) -> None:
    """One request more, which begins and ends now."""
    now = microseconds(services.ledger._clock())
    made = Registration(f"dec_{number:032x}", now, "t", "k", "/v1/x", "tiny", 1, 1, (expert,))
    entry = services.ledger.register(made)
    await entry.registered()
    entry.end(COMPLETED, Used(10, 4, 2, [30, 10], [0] * 2))
    while made.request in services.ledger._running:
        await asyncio.sleep(0.001)


async def requests_of(call: Any, month: str) -> int:
    return (await call("sk-owner", "GET", f"/v1/statements/{month}")).json()["requests"]
