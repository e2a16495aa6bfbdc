"""Terms are closed: an unknown field or word is refused, and so is what could be read two ways."""

from __future__ import annotations

import math
from decimal import Decimal

import pytest
from pydantic import ValidationError

from flexgate.policies.agreements import STORED, Agreement
from flexgate.policies.documents import Expert, ExpertSet, Tenant
from flexgate.policies.errors import InvalidName
from flexgate.policies.ids import parse_expert_id, parse_set_id

PAID = {"kind": "compensate", "rate": "0.000000001", "currency": "EUR", "unit": "request"}
REFUSED = [
    ("unknown field", {"colour": "red"}),
    ("unknown effect", {"effect": "allow"}),
    ("unknown purpose", {"purposes": ["fun"]}),
    ("empty purposes", {"purposes": []}),
    ("unknown region", {"regions": ["UK"]}),
    ("empty regions", {"regions": []}),
    ("bad subdivision", {"regions": ["DE-bayern"]}),
    ("subdivision that there is none of", {"regions": ["DE-XX"]}),
    ("country in small letters", {"regions": ["de"]}),
    ("license that there is none of", {"license_expression": "CC-BY-ND-5.0"}),
    ("license in words", {"license_expression": "all rights reserved"}),
    ("license without an end", {"license_expression": "MIT OR"}),
    ("license of any length", {"license_expression": " OR ".join(["MIT"] * 40)}),
    ("no experts", {"experts": []}),
    ("public", {"experts": ["public"]}),
    ("bad expert id", {"experts": ["News"]}),
    ("newline in expert id", {"experts": ["news\n"]}),
    ("newline in id", {"id": "a1\n"}),
    ("bad set", {"experts": ["set:"]}),
    ("bad assignee", {"assignee": "acme"}),
    ("empty assignee", {"assignee": "tenant:"}),
    ("newline in assignee", {"assignee": "tenant:acme\n"}),
    ("no time zone", {"not_before": "2026-01-01T00:00:00"}),
    ("split second", {"not_before": "2026-01-01T00:00:00.5Z"}),
    (
        "end before start",
        {"not_before": "2026-01-02T00:00:00Z", "not_after": "2026-01-01T00:00:00Z"},
    ),
    (
        "end at start",
        {"not_before": "2026-01-01T00:00:00Z", "not_after": "2026-01-01T00:00:00Z"},
    ),
    ("version zero", {"version": 0}),
    ("unknown duty", {"duties": [{"kind": "sing"}]}),
    ("duty with unknown field", {"duties": [{"kind": "attribute", "loud": True}]}),
    (
        "negative rate",
        {"duties": [{"kind": "compensate", "rate": "-1", "currency": "EUR", "unit": "request"}]},
    ),
    ("rate of ten decimals", {"duties": [{**PAID, "rate": "0.0000000001"}]}),
    ("rate of 19 digits", {"duties": [{**PAID, "rate": "1234567890123456789"}]}),
    ("infinite rate", {"duties": [{**PAID, "rate": "Infinity"}]}),
    ("no currency", {"duties": [{**PAID, "currency": "EUX"}]}),
    ("gold", {"duties": [{**PAID, "currency": "XAU"}]}),
    ("unknown unit", {"duties": [{**PAID, "unit": "token"}]}),
    ("unknown period", {"duties": [{"kind": "report", "period": "year"}]}),
    ("credit of two lines", {"duties": [{"kind": "attribute", "credit": "a\nb"}]}),
    ("plain http", {"terms_uri": "http://example.org/terms"}),
    ("short digest", {"terms_sha256": "ab"}),
]


@pytest.mark.parametrize("fields", [f for _, f in REFUSED], ids=[why for why, _ in REFUSED])
def test_agreement_is_refused(world, fields):
    with pytest.raises(ValidationError):
        Agreement.model_validate(world.agreement(**fields))


def test_full_agreement_is_accepted(world):
    agreement = Agreement.model_validate(
        world.agreement(
            experts=["news", "set:archive"],
            assignee="group:press",
            purposes=["train-ai", "x-lab"],
            regions=["DE-BY", "EEA"],
            not_before="2026-01-01T01:00:00+01:00",
            license_expression="LicenseRef-Wire-1.0 OR CC-BY-4.0",
            terms_uri="https://example.org/terms",
            terms_sha256="0" * 64,
        )
    )
    assert agreement.purposes == {"ai-train", "x-lab"}
    assert (agreement.starts, agreement.ends) == (1767225600.0, math.inf)


def test_an_agreement_with_duties_that_are_executed_is_accepted(world):
    duties = [{"kind": "attribute", "credit": "News by Wire"}, PAID, {**PAID, "unit": "thousand_tokens", "rate": 3}]
    agreement = Agreement.model_validate(world.agreement(duties=duties))
    assert [duty.kind for duty in agreement.duties] == ["attribute", "compensate", "compensate"]
    assert agreement.duties[1].rate == Decimal("0.000000001")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"duties": [PAID, PAID]}, "'duties' has 'compensate' per 'request' twice: leave one of them out"),
        ({"duties": [{"kind": "attribute"}] * 2}, "'duties' has 'attribute' twice: leave one of them out"),
        (
            {"duties": [PAID, {**PAID, "currency": "USD", "unit": "thousand_tokens"}]},
            "'duties' pays in EUR and USD: use one currency in an agreement",
        ),
        ({"duties": [PAID], "effect": "prohibit"}, "a prohibition has no duties, because nothing is used under it"),
    ],
)
def test_a_duty_that_cannot_be_executed_is_refused_in_words(world, fields, said):
    with pytest.raises(ValidationError) as error:
        Agreement.model_validate(world.agreement(**fields))
    assert said in str(error.value)


def test_a_currency_that_has_gone_from_the_list_is_read_where_it_is_stored(world):
    stored = world.agreement(duties=[{**PAID, "currency": "DEM"}])
    assert Agreement.model_validate(stored, context=STORED).executed
    with pytest.raises(ValidationError, match="'DEM' is not a currency: use a code of ISO 4217"):
        Agreement.model_validate(stored)


def test_documents_are_frozen(world):
    agreement = Agreement.model_validate(world.agreement())
    with pytest.raises(ValidationError):
        agreement.effect = "prohibit"  # type: ignore[misc]


@pytest.mark.parametrize("text", ["a", "0", "a-b", "a" * 63])
def test_expert_ids_accepted(text):
    assert parse_expert_id(text) == text
    assert parse_set_id(f"set:{text}") == f"set:{text}"


@pytest.mark.parametrize("text", ["", "-a", "A", "a_b", "a" * 64, "a\n", "ä", "set:a"])
def test_expert_ids_refused(text):
    with pytest.raises(InvalidName):
        parse_expert_id(text)
    with pytest.raises(InvalidName):
        parse_set_id(text.removeprefix("set:"))


@pytest.mark.parametrize("field", ["expert_ids", "hidden", "listed"])
def test_tenant_lists_leave_public_alone(world, field):
    with pytest.raises(ValidationError):
        Tenant.model_validate(world.tenant(**{field: ["public"]}))


def test_tenant_and_expert_are_closed(world):
    with pytest.raises(ValidationError):
        Tenant.model_validate(world.tenant(is_admin=True))
    with pytest.raises(ValidationError):
        Expert.model_validate({"id": "news", "owner": "wire", "path": "/"})
    with pytest.raises(ValidationError):
        ExpertSet.model_validate({"id": "set:x", "experts": ["public"]})
