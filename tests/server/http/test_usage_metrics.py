"""What a scraper reads of usage: what the ledger has, under a bounded number of names, none of them hidden ones."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest
from generating import PATH, Generating, refuse
from prometheus_client import CollectorRegistry, generate_latest

from flexgate.policies.documents import Expert
from flexgate.server.http.usage_metrics import HIDDEN, MOST_NAMES, OTHER, UsageMetrics
from flexgate.server.ledger.entries import COMPLETED, RegisteredExpert, Registration, Used
from flexgate.server.ledger.errors import LedgerError
from flexgate.server.ledger.journal import Journal

pytestmark = pytest.mark.asyncio

EXPERTS = (
    RegisteredExpert(0, "public", None),
    RegisteredExpert(1, "news", "gazette", "a-news", 1),
    RegisteredExpert(2, "secret", "vault"),
)
CATALOGUE = {
    "public": Expert(id="public", owner=None),
    "news": Expert(id="news", owner="gazette"),
    "secret": Expert(id="secret", owner="vault", visibility="hidden"),
}


def registration(name: str, project: str = "proj_a", **values: Any) -> Registration:
    given: dict[str, Any] = {"endpoint": PATH, "model": "tiny", "policy_version": 1, "weights_epoch": 1} | values
    return Registration(f"dec_{name}", 5, project, "key_a", experts=given.pop("experts", EXPERTS), **given)


def used(prompt: int, completion: int, *weights: int) -> Used:
    """Each expert with a weight took part in every position."""
    part = [1 if weight else 0 for weight in weights]
    return Used(
        prompt,
        prompt // 2,
        completion,
        [prompt * weight << 32 for weight in weights] + [prompt * one for one in part],
        [completion * weight << 32 for weight in weights] + [completion * one for one in part],
    )


@pytest.fixture
def usage() -> UsageMetrics:
    made = UsageMetrics()
    made.name_by(lambda: CATALOGUE)
    return made


@pytest.fixture
def journal(tmp_path: Path, usage: UsageMetrics) -> Iterator[Journal]:
    made = Journal(tmp_path / "ledger.db", clock=lambda: 9.5, count=usage.count)
    yield made
    made.close()


def series(text: str) -> dict[str, float]:
    """Ours, each with its value."""
    lines = [line.rpartition(" ") for line in text.splitlines() if line.startswith("flexgate")]
    return {name: float(value) for name, _, value in lines}


def read(usage: UsageMetrics) -> dict[str, float]:
    """What a scraper reads, by series."""
    registry = CollectorRegistry()
    registry.register(usage)
    return series(generate_latest(registry).decode())


async def record(journal: Journal, one: Registration, what: Used) -> None:
    entry = journal.register(one)
    await entry.registered()
    entry.end(COMPLETED, what)


async def test_counters_are_what_the_ledger_has(journal: Journal, usage: UsageMetrics) -> None:
    random = Random(7)
    for number in range(40):
        one = registration(str(number), random.choice(("proj_a", "proj_b")))
        weights = random.randint(1, 9), random.randint(0, 2), 0
        await record(journal, one, used(random.randint(1, 9), random.randint(0, 9), *weights))
    journal.close()
    found = read(usage)
    with closing(sqlite3.connect(journal.path)) as connection:
        projects = connection.execute(
            "SELECT tenant, count(*), sum(prompt_tokens), sum(cached_tokens), sum(completion_tokens) "
            "FROM usage GROUP BY 1"
        ).fetchall()
        experts = connection.execute(
            "SELECT expert, coalesce(owner, ''), count(*), sum(prompt_positions), sum(completion_positions), "
            "sum(share_ppm * (prompt_tokens + completion_tokens)), sum(prompt_mass + completion_mass) "
            "FROM parts JOIN usage USING (sequence) GROUP BY 1, 2"
        ).fetchall()
    wanted: dict[str, float] = {}
    for name, requests, *tokens in projects:
        wanted[f'flexgate_project_requests_total{{outcome="completed",project="{name}"}}'] = requests
        for kind, value in zip(("prompt", "cached", "completion"), tokens, strict=True):
            wanted[f'flexgate_project_tokens_total{{kind="{kind}",project="{name}"}}'] = value
    for name, owner, requests, prompt, completion, share_ppm, mass in experts:
        labels = f'expert="{name}"', f'owner="{owner}"'
        both = ",".join(labels)
        wanted[f"flexgate_expert_requests_total{{{both}}}"] = requests
        wanted[f'flexgate_expert_tokens_total{{{labels[0]},kind="prompt",{labels[1]}}}'] = prompt
        wanted[f'flexgate_expert_tokens_total{{{labels[0]},kind="completion",{labels[1]}}}'] = completion
        wanted[f"flexgate_expert_share_weighted_tokens_total{{{both}}}"] = share_ppm / 1_000_000
        wanted[f"flexgate_expert_routing_weight_total{{{both}}}"] = mass / 2**32
    assert len(projects) == len(experts) == 2
    assert found == pytest.approx(wanted)


async def test_an_expert_that_the_catalogue_hides_has_no_name(journal: Journal, usage: UsageMetrics) -> None:
    await record(journal, registration("a"), used(4, 2, 1, 1, 2))
    journal.close()
    usage.count_denial([("secret", "tenant_not_allowed", "…"), ("gone", "tenant_not_allowed", "…")])
    found = read(usage)
    assert found[f'flexgate_expert_requests_total{{expert="{HIDDEN}",owner="{HIDDEN}"}}'] == 1
    assert found[f'flexgate_denials_total{{code="tenant_not_allowed",expert="{HIDDEN}",owner="{HIDDEN}"}}'] == 2
    assert [line for line in found if "secret" in line or "vault" in line or "gone" in line] == []


async def test_names_beyond_the_bound_count_together(usage: UsageMetrics) -> None:
    names = [f"e{number}" for number in range(MOST_NAMES + 7)]
    usage.name_by(lambda: {name: Expert(id=name, owner=f"o-{name}") for name in names})
    for name in names:
        one = registration(name, f"proj_{name}", experts=(RegisteredExpert(0, name, f"o-{name}"),))
        usage.count(one, COMPLETED, used(3, 2, 1), used(3, 2, 1).parts(one))
        usage.count_denial([(name, "tenant_not_allowed", "…")])
    found = read(usage)
    assert found[f'flexgate_expert_requests_total{{expert="{OTHER}",owner="{OTHER}"}}'] == 7
    assert found[f'flexgate_project_tokens_total{{kind="prompt",project="{OTHER}"}}'] == 21
    assert found[f'flexgate_denials_total{{code="{OTHER}",expert="{OTHER}",owner="{OTHER}"}}'] == 7
    assert len(found) == (MOST_NAMES + 1) * (5 + 4 + 1)


async def test_an_end_counts_once_it_is_on_disk_and_then_once(
    journal: Journal, usage: UsageMetrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = journal.register(registration("a"))
    await entry.registered()
    with monkeypatch.context() as failing:
        refuse(journal, failing, after=0)
        entry.end(COMPLETED, used(4, 2, 1, 1))
        while not journal.failing:
            await asyncio.sleep(0.001)
        assert journal.state().unwritten == 1
        assert read(usage) == {}
        with pytest.raises(LedgerError):
            journal.register(registration("b"))
    journal.close()
    assert read(usage)['flexgate_project_requests_total{outcome="completed",project="proj_a"}'] == 1
    assert journal.state().unwritten == 0


async def test_requests_that_a_server_left_running_count_at_the_next_start(tmp_path: Path, usage: UsageMetrics) -> None:
    first = Journal(tmp_path / "ledger.db", clock=lambda: 1.0)
    await first.register(registration("a")).registered()
    assert first.state().running == 1
    first.close()
    again = Journal(tmp_path / "ledger.db", clock=lambda: 2.0, count=usage.count)
    again.close()
    assert read(usage)['flexgate_project_requests_total{outcome="interrupted",project="proj_a"}'] == 1
    assert again.state().running == 0


async def test_what_a_killed_server_left_counts_by_names_that_come_later(tmp_path: Path) -> None:
    first = Journal(tmp_path / "ledger.db", clock=lambda: 1.0)
    one = registration("a")
    await first.register(one).registered()
    await first.mark(one.request, used(4, 2, 1, 1, 2))
    first.close()
    usage = UsageMetrics()
    Journal(tmp_path / "ledger.db", clock=lambda: 2.0, count=usage.count).close()
    usage.name_by(lambda: CATALOGUE)
    found = read(usage)
    assert found['flexgate_expert_requests_total{expert="news",owner="gazette"}'] == 1
    assert found['flexgate_expert_requests_total{expert="public",owner=""}'] == 1
    assert found[f'flexgate_expert_requests_total{{expert="{HIDDEN}",owner="{HIDDEN}"}}'] == 1


async def test_an_expert_that_is_hidden_later_loses_its_name() -> None:
    usage = UsageMetrics()
    catalogue = dict(CATALOGUE)
    usage.name_by(lambda: catalogue)
    for name in "ab":
        one = registration(name)
        usage.count(one, COMPLETED, used(4, 2, 1, 1, 2), used(4, 2, 1, 1, 2).parts(one))
    usage.count_denial([("news", "tenant_not_allowed", "…"), ("secret", "tenant_not_allowed", "…")])
    assert read(usage)['flexgate_expert_requests_total{expert="news",owner="gazette"}'] == 2
    catalogue["news"] = Expert(id="news", owner="gazette", visibility="hidden")
    found = read(usage)
    assert [line for line in found if "news" in line or "gazette" in line] == []
    assert found[f'flexgate_expert_requests_total{{expert="{HIDDEN}",owner="{HIDDEN}"}}'] == 4
    assert found[f'flexgate_denials_total{{code="tenant_not_allowed",expert="{HIDDEN}",owner="{HIDDEN}"}}'] == 2


async def test_a_ledger_says_what_its_copies_lack_and_how_far_the_clock_is_behind(tmp_path: Path) -> None:
    at, sent = [9.0], [0]
    journal = Journal(tmp_path / "ledger.db", clock=lambda: at[0])
    journal.retention.until(lambda: sent[0], "events")
    journal.retention.until(lambda: 0)
    for name in "abc":
        await record(journal, registration(name), used(1, 1, 1))
    journal.close()
    sent[0], at[0] = 2, 4.0
    assert (journal.state().uncopied, journal.state().behind_seconds) == ({"events": 1}, 5.0)
    again = Journal(tmp_path / "ledger.db", clock=lambda: 20.0)
    again.retention.until(lambda: 1, "events")
    assert (again.state().uncopied, again.state().behind_seconds) == ({"events": 2}, 0.0)
    again.close()


async def test_an_auditor_reads_the_usage_of_a_request_and_why_another_was_denied(
    make_client: Callable[..., httpx.AsyncClient], services: Any
) -> None:
    async def scraped() -> dict[str, float]:
        async with make_client("sk-auditor") as http:
            return series((await http.get("/metrics")).text)

    before = await scraped()
    services.handlers.completion.create_completion = Generating(3)
    async with make_client() as http:
        assert (await http.post(PATH, json={"prompt": "x"})).status_code == 200
        denied = await http.post(PATH, json={"prompt": "x", "flexgate": {"experts": {"only": ["math"]}}})
        assert denied.status_code == 403
    services.ledger.close()
    after = await scraped()
    more = {name: value - before.get(name, 0) for name, value in after.items()}
    assert more['flexgate_project_tokens_total{kind="prompt",project="t"}'] == 5
    assert more['flexgate_expert_requests_total{expert="news",owner="gazette"}'] == 1
    (reason,) = (name for name, value in more.items() if name.startswith("flexgate_denials_total") and value)
    assert 'expert="math",owner="academy"' in reason
    assert after['flexgate_ledger_uncopied{copy="receipts"}'] == 1
    assert after["flexgate_ledger_unwritten"] == 0
