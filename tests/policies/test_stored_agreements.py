"""Stored agreements that could not be made today permit less, and prohibit no less."""

from __future__ import annotations

import pytest

from flexgate.policies.agreements import STORED, Agreement

REPORT = [{"kind": "report", "period": "day"}]


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


def test_a_permission_with_duties_permits_nothing(world):
    permission = Agreement.model_validate(world.agreement(duties=REPORT), context=STORED)
    assert "news" not in world.ask(world.build([permission], [world.tenant(mode="deny_list")])).allowed


def test_a_prohibition_with_duties_prohibits(world):
    ban = Agreement.model_validate(world.agreement("ban", effect="prohibit", duties=REPORT), context=STORED)
    snapshot = world.build([world.agreement(), ban], [world.tenant(mode="deny_list")])
    assert "news" not in world.ask(snapshot).allowed
