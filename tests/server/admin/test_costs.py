"""What the `openai` package's admin client reads of what is owed to owners."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest
import pytest_asyncio

from flexgate.policies.agreements import Agreement, duties_sha256
from flexgate.policies.store import Store
from flexgate.policies.store.agreements import revise_agreement, terminate_agreement
from flexgate.server.ledger.entries import COMPLETED, RegisteredExpert, Registration, Used
from flexgate.server.ledger.journal import Journal

pytestmark = pytest.mark.asyncio

DAY = 86_400
START = 20_000 * DAY
TERMS = {"experts": ["news"], "assignee": "everyone", "effect": "permit"}
PER_REQUEST = {"kind": "compensate", "rate": "0.0001", "currency": "EUR", "unit": "request"}
PER_TOKEN = {"kind": "compensate", "rate": "3", "currency": "EUR", "unit": "thousand_tokens"}
BY_SHARE = {"kind": "compensate", "rate": "1", "currency": "JPY", "unit": "thousand_share_weighted_tokens"}


@pytest.fixture
def agreements(real_store: Store) -> dict[int, list[dict[str, Any]]]:
    """The duties of versions 2 and 3 of the agreement on news; it is not in force any more."""
    versions = {2: [PER_REQUEST, PER_TOKEN], 3: [BY_SHARE]}
    for duties in versions.values():
        revise_agreement(real_store, "a-news", {**TERMS, "duties": duties}, actor="test", at=2.0)
    terminate_agreement(real_store, "a-news", actor="test", at=3.0)
    return versions


@pytest_asyncio.fixture
async def recorded(ledger: Journal, agreements: Any) -> Journal:
    """Two requests of version 2, one of version 3, and one without the expert, of two projects."""
    at, ledger._clock = [float(START)], lambda: at[0]
    rows = (("t", "key_1", 2, 5), ("u", "key_2", 2, 5), ("t", "key_1", 3, 4), ("u", "key_2", 3, 0))
    for number, (tenant, key, version, tokens) in enumerate(rows):
        at[0] = START + DAY / 3 * number
        experts = (RegisteredExpert(0, "public", "commons"), RegisteredExpert(1, "news", "gazette", "a-news", version))
        entry = ledger.register(Registration(f"dec_{number}", 1, tenant, key, "/v1/x", "tiny", 1, 1, experts))
        entry.end(COMPLETED, Used(10, 4, tokens, [15, 0, 10, 0], [0, tokens, 0, tokens]))
        await entry.registered()
    await ledger.register(Registration("dec_last", 1, "t", "key_1", "/v1/x", "tiny", 1, 1, experts)).registered()
    return ledger


def amounts(bucket: Any) -> list[tuple[str, str, float]]:
    return [(one.amount.currency, one.amount.exact, one.amount.value) for one in bucket.results]


async def test_costs_are_summed_by_day_and_currency_at_the_rates_in_force(admin: Any, recorded: Journal) -> None:
    page = await admin.usage.costs(start_time=START, end_time=START + 3 * DAY)
    assert [bucket.start_time for bucket in page.data] == [START, START + DAY, START + 2 * DAY]
    share = 14 * 210_526  # 4 of 19, in ppm, of 14 tokens
    assert [amounts(bucket) for bucket in page.data] == [
        [("eur", "0.0302", 0.0302), ("jpy", f"{share / 10**9:.9f}".rstrip("0"), share / 10**9)],
        [],
        [],
    ]
    assert {result.object for bucket in page.data for result in bucket.results} == {"organization.costs.result"}


async def test_costs_are_summed_by_project_and_expert(admin: Any, recorded: Journal) -> None:
    page = await admin.usage.costs(start_time=START, end_time=START + DAY, group_by=["project_id", "expert_id"])
    found = [(r.project_id, r.expert_id, r.amount.exact, r.amount.currency) for r in page.data[0].results]
    assert [one[:3] for one in found if one[3] == "eur"] == [("t", "news", "0.0151"), ("u", "news", "0.0151")]
    of_u = await admin.usage.costs(start_time=START, end_time=START + DAY, project_ids=["u"])
    assert amounts(of_u.data[0]) == [("eur", "0.0151", 0.0151)]


async def test_a_line_item_is_a_rate_of_a_version_with_its_quantity(admin: Any, recorded: Journal) -> None:
    page = await admin.usage.costs(start_time=START, end_time=START + DAY, group_by=["line_item"])
    found = [(r.line_item, r.quantity, r.quantity_unit, r.amount.value) for r in page.data[0].results]
    assert found[:2] == [
        ("a-news@2, request", 2.0, "requests", 0.0002),
        ("a-news@2, thousand_tokens", 0.01, "1000_tokens", 0.03),
    ]
    assert found[2][::2] == ("a-news@3, thousand_share_weighted_tokens", "1000_share_weighted_tokens")


async def test_uses_of_an_agreement_that_the_policy_database_never_had_have_no_price(
    admin: Any, ledger: Journal, recorded: Journal
) -> None:
    experts = (RegisteredExpert(1, "news", "gazette", "a-news", 99),)
    entry = ledger.register(Registration("dec_other", 1, "t", "key_1", "/v1/x", "tiny", 1, 1, experts))
    entry.end(COMPLETED, Used(1, 0, 1, [0, 1, 0, 1], [0, 1, 0, 1]))
    await entry.registered()
    await ledger.register(Registration("dec_end", 1, "t", "key_1", "/v1/x", "tiny", 1, 1, experts)).registered()
    with pytest.raises(openai.InternalServerError, match="version 99 of agreement 'a-news', which this policy"):
        await admin.usage.costs(start_time=START, end_time=START + 2 * DAY)


async def test_uses_under_other_duties_than_the_policy_database_has_have_no_price(
    admin: Any, ledger: Journal, recorded: Journal, agreements: dict[int, list[dict[str, Any]]]
) -> None:
    """An older copy of the policy database was restored, and the version's number given once more."""
    for number, said in ((2, agreements[2]), (3, agreements[2])):
        duties = Agreement.model_validate({**TERMS, "id": "a", "owner": "gazette", "duties": said}).duties
        experts = (RegisteredExpert(1, "news", "gazette", "a-news", number, None, duties_sha256(duties)),)
        entry = ledger.register(Registration(f"dec_v{number}", 1, "t", "key_1", "/v1/x", "tiny", 1, 1, experts))
        entry.end(COMPLETED, Used(1, 0, 1, [0, 1, 0, 1], [0, 1, 0, 1]))
        await entry.registered()
        if number == 2:
            await admin.usage.costs(start_time=START, end_time=START + 2 * DAY)
    await ledger.register(Registration("dec_end", 1, "t", "key_1", "/v1/x", "tiny", 1, 1, experts)).registered()
    with pytest.raises(openai.InternalServerError, match="version 3 of agreement 'a-news'") as refused:
        await admin.usage.costs(start_time=START, end_time=START + 2 * DAY)
    assert "which this policy database has with other duties" in str(refused.value)


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ({"start_time": START, "limit": 181}, "limit"),
        ({"start_time": START, "end_time": START}, "'end_time' must be after 'start_time'"),
        ({"start_time": START, "page": "page_7"}, "page"),
        ({"start_time": START, "bucket_width": "1h"}, "bucket_width"),
        ({"start_time": START, "group_by": ["user_id"]}, "group_by"),
        ({"start_time": START, "line_items": ["a"]}, "line_items"),
    ],
)
async def test_a_query_that_makes_no_sense_is_refused(admin: Any, query: dict[str, Any], said: str) -> None:
    with pytest.raises(openai.BadRequestError, match=said):
        await admin.usage.costs(**query)


@pytest.mark.parametrize(("key", "status"), [("sk-t", 403), ("sk-owner", 403), ("sk-auditor", 200)])
async def test_auditors_read_costs_and_tenants_do_not(make_client: Any, key: str, status: int) -> None:
    client: httpx.AsyncClient = make_client(key)
    async with client:
        response = await client.get(f"/v1/organization/costs?start_time={START}&end_time={START + 1}")
    assert response.status_code == status
