"""Stored agreements that could not be made today permit less, and prohibit no less."""

from __future__ import annotations

import pytest

from flexgate.policies.agreements import STORED, Agreement

PAID = [{"kind": "compensate", "rate": "1", "currency": currency, "unit": "request"} for currency in ("EUR", "USD")]


@pytest.mark.parametrize(
    ("unknown", "reached"),
    [("DE-ZZ", ["DE", "DE-BY", None]), ("ZZ", ["DE", "DE-BY", "FR", None]), ("FR-75C", ["FR", None])],
)
def test_a_prohibition_for_a_region_that_is_unknown_reaches_its_country_or_everywhere(world, unknown, reached):
    ban = world.agreement("ban", effect="prohibit", regions=[unknown])
    snapshot = world.build(
        [world.agreement(), Agreement.model_validate(ban, context=STORED)],
        [world.tenant(mode="deny_list", regions=["DE", "DE-BY", "FR"])],
    )
    asked = ["DE", "DE-BY", "FR", None]
    assert [region for region in asked if "news" not in world.ask(snapshot, region=region).allowed] == reached


def test_a_permission_with_duties_that_cannot_be_executed_permits_nothing(world):
    permission = Agreement.model_validate(world.agreement(duties=PAID), context=STORED)
    assert "news" not in world.ask(world.build([permission], [world.tenant(mode="deny_list")])).allowed


def test_a_permission_with_duties_permits_and_the_decision_has_them(world):
    permission = Agreement.model_validate(world.agreement(duties=PAID[:1]), context=STORED)
    decision = world.ask(world.build([permission], [world.tenant(mode="deny_list")]))
    assert decision.allowed == ("public", "news")
    assert decision.agreements[1].duties == permission.duties


def test_a_prohibition_with_duties_prohibits(world):
    ban = Agreement.model_validate(world.agreement("ban", effect="prohibit", duties=PAID), context=STORED)
    snapshot = world.build([world.agreement(), ban], [world.tenant(mode="deny_list")])
    assert "news" not in world.ask(snapshot).allowed
