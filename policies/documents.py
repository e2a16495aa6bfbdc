"""Tenants (OpenAI's projects), experts, sets of experts and keys, as stored documents."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError, model_validator

from flexgate.policies.agreements import AS_STORED, Currency, Document, Line, PurposeField, RegionField, SetOf
from flexgate.policies.errors import InvalidName
from flexgate.policies.field_errors import first_field_error
from flexgate.policies.ids import (
    PUBLIC,
    ExpertIdField,
    ExpertReference,
    GroupIdField,
    OwnerId,
    OwnerIdField,
    SetIdField,
    TenantId,
    TenantIdField,
)


def _leaves_public_alone(references: frozenset[str]) -> frozenset[str]:
    if PUBLIC in references:
        raise InvalidName(
            "'public' cannot be listed, because every project has it; to let requests ignore it, set 'anchor_optional'"
        )
    return references


_TITLE: Final = TypeAdapter(Line)
References = Annotated[SetOf[ExpertReference], AfterValidator(_leaves_public_alone)]


BILLION: Final = 10**9
Amount = Annotated[int, Field(ge=0, le=10**15)] | None


def require_title(text: str) -> None:
    """Raise `InvalidName` unless `text` is a valid new name."""
    try:
        _TITLE.validate_python(text)
    except ValidationError as error:
        raise InvalidName(first_field_error(error).about("'name'")) from None


class Cost(Document):
    """An amount of money, of at most a billion, to nine decimal places."""

    amount: Annotated[Decimal, Field(ge=0, le=10**9, decimal_places=9, strict=False)]
    currency: Currency

    @property
    def billionths(self) -> int:
        """The amount in whole billionths of the currency."""
        return int(self.amount * BILLION)

    def __str__(self) -> str:
        return f"{self.amount:f} {self.currency}"


class Quota(Document):
    """Limits of a project or of one of its keys; None is no limit.

    `total_tokens` is a lifetime budget: raise it to allow more. `cost_per_day` and `cost_per_month` limit what is owed
    to owners by their agreements. Days and months are those of UTC, and what a request used counts in the one in which
    it ended.
    """

    requests_per_minute: Amount = None
    tokens_per_minute: Amount = None
    concurrent_requests: Amount = None
    tokens_per_day: Amount = None
    tokens_per_month: Amount = None
    requests_per_day: Amount = None
    requests_per_month: Amount = None
    cost_per_day: Cost | None = None
    cost_per_month: Cost | None = None
    total_tokens: Amount = None

    @model_validator(mode="after")
    def _in_one_currency(self) -> Quota:
        day, month = self.cost_per_day, self.cost_per_month
        if day is not None and month is not None and day.currency != month.currency:
            raise InvalidName(
                f"cost_per_day is in {day.currency} and cost_per_month in {month.currency}: use one currency for both"
            )
        return self


class Tenant(Document):
    """A project that calls the API. A new one has an empty allow list, and gets `public`.

    `purposes` and `regions` are what its requests may declare; a request that declares none stands
    for all of them, which limited permissions do not reach. `default_experts` is the
    `only` of requests without one. `hidden` and `listed` override the catalogue's visibility. `key_quotas`
    are by key id and apply in addition to `quota`. `min_grade` is the least grade of what its requests exclude; None
    excludes whatever the grade.
    """

    id: TenantIdField
    name: Annotated[Line, AS_STORED]
    mode: Literal["allow_list", "deny_list"] = "allow_list"
    expert_ids: References = frozenset()
    hidden: References = frozenset()
    listed: References = frozenset()
    default_experts: SetOf[ExpertReference] | None = None
    anchor_optional: bool = False
    min_grade: Literal["shared", "router", "removed"] | None = None
    groups: SetOf[GroupIdField] = frozenset()
    purposes: SetOf[PurposeField] = frozenset()
    regions: SetOf[RegionField] = frozenset()
    quota: Quota = Quota()
    key_quotas: Annotated[Mapping[str, Quota], Field(strict=False)] = {}
    archived: bool = False


Grade = Literal["removed", "router", "shared", "unknown"]
"""What excluding an expert excludes: all that was learnt from its data (`removed`); all but what a router has learnt
that was trained with it (`router`), or shared weights that were trained or averaged with it (`shared`)."""
_BY_STRENGTH: Final[tuple[Grade, ...]] = ("unknown", "shared", "router", "removed")


def is_below(grade: Grade, least: Grade) -> bool:
    """Whether a grade promises less than `least`."""
    return _BY_STRENGTH.index(grade) < _BY_STRENGTH.index(least)


def weakest(*grades: Grade) -> Grade:
    """The grade that promises least."""
    return min(grades, key=_BY_STRENGTH.index)


class Expert(Document):
    """One expert of the catalogue. `live` says that the engine serves it now, `required` that every request uses it.

    One without an owner needs no agreement, and no agreement can name it: projects' lists alone decide. `empty_layers`
    are the layers of the model that have experts, and none of it.
    """

    id: ExpertIdField
    owner: OwnerIdField | None
    domain: Annotated[str, Field(max_length=200)] = ""
    live: bool = True
    visibility: Literal["listed", "hidden"] = "listed"
    required: bool = False
    grade: Grade = "unknown"
    empty_layers: SetOf[Annotated[int, Field(ge=0, le=9_999)]] = frozenset()


class ExpertSet(Document):
    """A named set of experts, usable wherever an expert may be named."""

    id: SetIdField
    experts: Annotated[SetOf[ExpertIdField], Field(min_length=1), AfterValidator(_leaves_public_alone)]


class Role(enum.StrEnum):
    """Role of a key. Only `TENANT` keys infer, and they do nothing else."""

    TENANT = "tenant"
    ADMIN = "admin"
    AUDITOR = "auditor"
    OWNER = "owner"


Seconds = Annotated[float, Field(strict=True, allow_inf_nan=False)]


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyRecord:
    """What is kept of an API key: its SHA-256 and what it stands for, never the key.

    A tenant's key carries `tenant_id`, an owner's key `owner_id`, the others neither. Times are
    Unix seconds; `expires` takes effect at that second, and a key that has `revoked` at once.
    """

    key_id: str
    sha256: bytes
    prefix: str
    role: Role
    tenant_id: TenantId | None = None
    owner_id: OwnerId | None = None
    created: Seconds
    expires: Seconds | None = None
    revoked: Seconds | None = None
    name: str = ""
