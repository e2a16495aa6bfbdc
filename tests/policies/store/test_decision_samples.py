"""Samples are counted once each, by all who write, and the table never outgrows its bounds."""

from __future__ import annotations

import pytest

from flexgate.policies.store import Store, decision_samples
from flexgate.policies.store.decision_samples import CountedSample, DecisionSample, add_samples, read_samples


def sample(number: int = 0, *, tenant: str = "acme", **fields: object) -> DecisionSample:
    values = {"tenant_id": tenant, "purpose": f"x-{number}", "region": "DE", "only": None, "ignore": ()}
    return DecisionSample(**{**values, **fields})


def test_samples_add_up_and_come_back_as_they_were(store: Store) -> None:
    plain, filtered = sample(only=()), sample(only=("news", "set:two"), ignore=("math",))
    bare = sample(purpose=None, region=None)
    add_samples(
        store.engine, [CountedSample(plain, 2, 5.0), CountedSample(filtered, 1, 6.0), CountedSample(bare, 1, 4.0)]
    )
    add_samples(store.engine, [CountedSample(plain, 3, 7.0)])
    assert read_samples(store.engine) == [
        CountedSample(plain, 5, 7.0),
        CountedSample(filtered, 1, 6.0),
        CountedSample(bare, 1, 4.0),
    ]


def test_every_part_of_a_sample_tells_it_from_others() -> None:
    different = [
        sample(),
        sample(tenant="other"),
        sample(purpose=None),
        sample(region=None),
        sample(only=()),
        sample(only=("news",)),
        sample(ignore=("news",)),
    ]
    assert len({one.id for one in different}) == len(different)


def test_of_one_tenant_the_newest_are_kept(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decision_samples, "MOST_OF_ONE", 3)
    flood = [CountedSample(sample(number), 1, float(number)) for number in range(9)]
    add_samples(store.engine, [*flood, CountedSample(sample(tenant="quiet"), 1, 0.5)])
    kept = [(asked.sample.tenant_id, asked.last) for asked in read_samples(store.engine)]
    assert kept == [("acme", 8.0), ("acme", 7.0), ("acme", 6.0), ("quiet", 0.5)]


def test_of_all_the_newest_are_kept(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decision_samples, "MOST", 2)
    for number in range(5):
        add_samples(store.engine, [CountedSample(sample(tenant=f"t{number}"), 1, float(number))])
    assert [asked.sample.tenant_id for asked in read_samples(store.engine)] == ["t4", "t3"]
