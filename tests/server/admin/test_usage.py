"""What the `openai` package's admin client reads of the ledger."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import httpx
import openai
import pytest
import pytest_asyncio

from flexgate.server.ledger.entries import COMPLETED, RegisteredExpert, Registration, Used
from flexgate.server.ledger.journal import Journal
from flexgate.server.ledger.receipts.service import Receipts

pytestmark = pytest.mark.asyncio

DAY = 86_400
START = 20_000 * DAY


@pytest_asyncio.fixture
async def recorded(ledger: Journal) -> Journal:
    """Three requests of two projects, one hour and one day apart."""
    experts = (RegisteredExpert(0, "public", "commons"), RegisteredExpert(1, "news", "gazette", "a-news", 4))
    at, ledger._clock = [float(START)], lambda: at[0]
    for number, (tenant, key, hours) in enumerate((("t", "key_1", 0), ("t", "key_2", 1), ("u", "key_3", 24))):
        at[0] = START + 3600.0 * hours + 0.25
        registration = Registration(f"dec_{number}", 1, tenant, key, "/v1/completions", "tiny", 1, 1, experts)
        entry = ledger.register(registration)
        news = number % 2
        entry.end(COMPLETED, Used(10, 4, 2, [10, 0, 10, 0], [2, news, 2, news]))
        await entry.registered()
    await ledger.register(
        Registration("dec_last", 1, "t", "key_1", "/v1/completions", "tiny", 1, 1, experts)
    ).registered()
    return ledger


def totals(results: Any) -> list[tuple[int, int, int, int]]:
    return [(r.input_tokens, r.input_cached_tokens, r.output_tokens, r.num_model_requests) for r in results]


async def test_usage_is_summed_by_day(admin: Any, recorded: Journal) -> None:
    page = await admin.usage.completions(start_time=START, end_time=START + 3 * DAY)
    assert [bucket.start_time for bucket in page.data] == [START, START + DAY, START + 2 * DAY]
    assert [totals(bucket.results) for bucket in page.data] == [[(20, 8, 4, 2)], [(10, 4, 2, 1)], []]
    assert (page.has_more, page.next_page) == (False, None)


async def test_usage_is_summed_by_project_key_and_model(admin: Any, recorded: Journal) -> None:
    page = await admin.usage.completions(
        start_time=START, end_time=START + 2 * DAY, group_by=["project_id", "api_key_id", "model"]
    )
    found = [(r.project_id, r.api_key_id, r.model, r.output_tokens) for b in page.data for r in b.results]
    assert found == [("t", "key_1", "tiny", 2), ("t", "key_2", "tiny", 2), ("u", "key_3", "tiny", 2)]
    of_u = await admin.usage.completions(start_time=START, end_time=START + 2 * DAY, project_ids=["u"])
    assert [totals(bucket.results) for bucket in of_u.data] == [[], [(10, 4, 2, 1)]]


async def test_usage_by_expert_counts_the_positions_that_it_took_part_in(admin: Any, recorded: Journal) -> None:
    page = await admin.usage.completions(
        start_time=START,
        end_time=START + DAY,
        group_by=["expert_id"],  # which OpenAI has not
    )
    found = [(r.expert_id, r.input_tokens, r.output_tokens, r.num_model_requests) for r in page.data[0].results]
    assert found == [("news", 0, 1, 1), ("public", 20, 4, 2)]


async def test_pages_follow_one_another(admin: Any, recorded: Journal) -> None:
    asked: dict[str, Any] = {"start_time": START + 1, "end_time": START + DAY + 3600, "bucket_width": "1h", "limit": 10}
    starts, found, page = [], [], None
    while True:
        part = await admin.usage.completions(**asked, **({} if page is None else {"page": page}))
        starts += [bucket.start_time for bucket in part.data]
        found += [result.output_tokens for bucket in part.data for result in bucket.results]
        page = part.next_page
        if not part.has_more:
            break
    assert starts == [START + 3600 * hour for hour in range(25)]
    assert found == [2, 2]  # the first ended before


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ({"start_time": START, "limit": 32}, "at most 31 buckets of '1d'"),
        ({"start_time": START, "end_time": START}, "'end_time' must be after 'start_time'"),
        ({"start_time": START, "page": "page_7"}, "page"),
        ({"start_time": START, "bucket_width": "2d"}, "bucket_width"),
        ({"start_time": START, "group_by": ["colour"]}, "group_by"),
        ({"start_time": START, "user_ids": ["someone"]}, "user_ids"),
    ],
)
async def test_a_query_that_makes_no_sense_is_refused(admin: Any, query: dict[str, Any], said: str) -> None:
    with pytest.raises(openai.BadRequestError, match=said):
        await admin.usage.completions(**query)


@pytest.mark.parametrize(
    ("bounds", "said"),
    [
        ({"usage.MOST_SUMS": 1}, "more than 1 sums: ask for less time, or group by less"),
        (
            {"usage.MOST_SECONDS": -1.0, "reading.INSTRUCTIONS": 1},
            "took longer than -1 seconds: ask for less time, or group",
        ),
    ],
)
async def test_a_query_that_asks_for_too_much_is_the_callers_to_mend(
    admin: Any, recorded: Journal, monkeypatch: pytest.MonkeyPatch, bounds: dict[str, Any], said: str
) -> None:
    for name, value in bounds.items():
        monkeypatch.setattr(f"flexgate.server.ledger.{name}", value)
    with pytest.raises(openai.BadRequestError, match=said) as error:
        await admin.usage.completions(start_time=START, end_time=START + 3 * DAY)
    assert error.value.code == "query_too_large"


async def test_a_page_says_before_which_time_usage_was_deleted(
    admin: Any, recorded: Journal, receipts: Receipts, monkeypatch: pytest.MonkeyPatch
) -> None:
    receipts.maker.work()
    monkeypatch.setattr("flexgate.server.ledger.retention.LOOK_SECONDS", 0.0)
    recorded._clock = lambda: float(START + 34 * DAY)
    recorded.retention.keep(33)
    async with asyncio.timeout(10):  # a page may say it just before the usage is deleted
        while True:
            page = await admin.usage.completions(start_time=START, end_time=START + 3 * DAY)
            if page.model_extra and not page.data[0].results:
                break
            await recorded.register(
                Registration(f"dec_{time.monotonic()}", 1, "t", "key_1", "/v1/completions", "tiny", 1, 1, ())
            ).registered()
    assert page.incomplete_before == START + DAY
    assert [totals(bucket.results) for bucket in page.data] == [[], [(10, 4, 2, 1)], []]
    page = await admin.usage.completions(start_time=START + DAY, end_time=START + 3 * DAY)
    assert not page.model_extra


@pytest.mark.parametrize(("key", "status"), [("sk-t", 403), ("sk-auditor", 200)])
async def test_auditors_read_usage_and_tenants_do_not(make_client: Any, key: str, status: int) -> None:
    client: httpx.AsyncClient = make_client(key)
    async with client:
        response = await client.get(f"/v1/organization/usage/completions?start_time={START}&end_time={START + 1}")
    assert response.status_code == status
