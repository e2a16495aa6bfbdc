"""Questions are counted once each, by all who write, and the table never outgrows its bounds."""

from __future__ import annotations

import pytest

from flexgate.policies.store import Store, decision_samples
from flexgate.policies.store.decision_samples import Asked, Question, add_questions, read_questions


def question(number: int = 0, *, tenant: str = "acme", **fields: object) -> Question:
    values = {"tenant_id": tenant, "purpose": f"x-{number}", "region": "DE", "only": None, "ignore": ()}
    return Question(**{**values, **fields})


def test_questions_add_up_and_come_back_as_they_were(store: Store) -> None:
    plain, filtered = question(only=()), question(only=("news", "set:two"), ignore=("math",))
    bare = question(purpose=None, region=None)
    add_questions(store.engine, [Asked(plain, 2, 5.0), Asked(filtered, 1, 6.0), Asked(bare, 1, 4.0)])
    add_questions(store.engine, [Asked(plain, 3, 7.0)])
    assert read_questions(store.engine) == [Asked(plain, 5, 7.0), Asked(filtered, 1, 6.0), Asked(bare, 1, 4.0)]


def test_every_part_of_a_question_tells_it_from_others() -> None:
    different = [
        question(),
        question(tenant="other"),
        question(purpose=None),
        question(region=None),
        question(only=()),
        question(only=("news",)),
        question(ignore=("news",)),
    ]
    assert len({one.id for one in different}) == len(different)


def test_of_one_tenant_the_newest_are_kept(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decision_samples, "MOST_OF_ONE", 3)
    flood = [Asked(question(number), 1, float(number)) for number in range(9)]
    add_questions(store.engine, [*flood, Asked(question(tenant="quiet"), 1, 0.5)])
    kept = [(asked.question.tenant_id, asked.last) for asked in read_questions(store.engine)]
    assert kept == [("acme", 8.0), ("acme", 7.0), ("acme", 6.0), ("quiet", 0.5)]


def test_of_all_the_newest_are_kept(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decision_samples, "MOST", 2)
    for number in range(5):
        add_questions(store.engine, [Asked(question(tenant=f"t{number}"), 1, float(number))])
    assert [asked.question.tenant_id for asked in read_questions(store.engine)] == ["t4", "t3"]
