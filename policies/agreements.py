"""Agreements: what an owner lets tenants use. Closed and typed.

An unknown field or word is refused, not ignored: a term that is not enforced is worse than none.
Times are half-open, `not_before <= now < not_after`, in whole seconds with a time zone.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from datetime import UTC, datetime
from decimal import Decimal
from functools import lru_cache
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_validator,
)

from flexgate.policies.errors import InvalidName
from flexgate.policies.ids import PUBLIC, AgreementIdField, Assignee, ExpertReference, OwnerIdField
from flexgate.policies.vocabulary import (
    Purpose,
    Region,
    parse_currency,
    parse_license_expression,
    parse_purpose,
    parse_region,
    parse_stored_region,
)

STORED: Final = {"stored": True}
"""Validation context of documents that are in the store already."""

_RFC_3339: Final = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?(Z|[+-]\d\d:\d\d)?", re.ASCII)

T = TypeVar("T")
ListOf = Annotated[tuple[T, ...], Field(strict=False, fail_fast=True)]
"""Written as an array. Its members are validated strictly, and the refusal names the first wrong one."""
SetOf = Annotated[frozenset[T], Field(strict=False, fail_fast=True)]
"""Written as an array whose order says nothing."""


def _without_public(references: frozenset[str]) -> frozenset[str]:
    if PUBLIC in references:
        raise InvalidName("'public' is every model's anchor: no agreement permits, prohibits or requires it")
    return references


def _written_time(value: Any) -> Any:
    """Parse a time written as a string. A number is refused: 20271231 would be a day of 1970."""
    if isinstance(value, datetime):
        return value
    if isinstance(value, str) and _RFC_3339.fullmatch(value):
        return datetime.fromisoformat(value)
    raise InvalidName(f"{str(value)[:40]!r} is not a time: write it as '2026-11-23T00:00:00Z'")


def _whole_second(moment: datetime) -> datetime:
    if moment.tzinfo is None:
        raise InvalidName("a time needs a time zone, for example 2026-11-23T00:00:00Z")
    if moment.microsecond:
        raise InvalidName("dates of an agreement are whole seconds")
    try:
        return moment.astimezone(UTC)
    except OverflowError:
        raise InvalidName("a time must be between the years 1 and 9999 (UTC)") from None


def _region(text: str, info: ValidationInfo) -> Region:
    return parse_stored_region(text) if info.context == STORED else parse_region(text)


Line = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]*$")]
"""A line of text that people read."""


def _currency(text: str, info: ValidationInfo) -> str:
    return text if info.context == STORED else parse_currency(text)


Currency = Annotated[str, StringConstraints(pattern=r"^[A-Z]{3}$"), AfterValidator(_currency)]


def _unless_stored(value: Any, check: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
    return value if info.context == STORED and isinstance(value, str) else check(value)


PurposeField = Annotated[Purpose, AfterValidator(parse_purpose)]
RegionField = Annotated[Region, AfterValidator(_region)]
Moment = Annotated[datetime, BeforeValidator(_written_time), AfterValidator(_whole_second)]
AS_STORED: Final = WrapValidator(_unless_stored)
"""Marks a label, which decides nothing: one that is stored is read as it is."""
LicenseExpression = Annotated[str, AfterValidator(parse_license_expression), AS_STORED]


class Document(BaseModel):
    """Base of everything an operator or owner writes: frozen, closed to unknown fields, and of the very
    types that its schema says.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Attribute(Document):
    """A response that the expert took part in names its owner, and has the owner's `credit` line if there is one."""

    kind: Literal["attribute"]
    credit: Line | None = None


class Report(Document):
    """Use is reported to the owner once per period."""

    kind: Literal["report"]
    period: Literal["day", "month"]


Unit = Literal[
    "request",
    "thousand_tokens",
    "thousand_share_weighted_tokens",
    "million_tokens",
    "million_share_weighted_tokens",
]


class Compensate(Document):
    """Use is paid: `rate` of `currency` per `unit`.

    Of an expert, a request counts in which it took part, and as tokens the positions in which it did. Share-weighted
    tokens are all tokens of the request, times the expert's share.
    """

    kind: Literal["compensate"]
    rate: Annotated[Decimal, Field(ge=0, max_digits=18, decimal_places=9, strict=False)]
    currency: Currency
    unit: Unit


Duty = Annotated[Attribute | Report | Compensate, Field(discriminator="kind")]


def require_executed(duties: tuple[Duty, ...], effect: str = "permit") -> None:
    """Raise `InvalidName` unless all duties of an agreement of this effect can be executed, together."""
    if duties and effect != "permit":
        kind = "prohibition" if effect == "prohibit" else "requirement"
        raise InvalidName(f"a {kind} has no duties, because nothing is used under it: leave 'duties' out")
    kinds = [f"'{duty.kind}' per '{duty.unit}'" if duty.kind == "compensate" else f"'{duty.kind}'" for duty in duties]
    twice = [kind for kind in kinds if kinds.count(kind) > 1]
    if twice:
        raise InvalidName(f"'duties' has {twice[0]} twice: leave one of them out")
    currencies = sorted({duty.currency for duty in duties if duty.kind == "compensate"})
    if len(currencies) > 1:
        raise InvalidName(f"'duties' pays in {' and '.join(currencies)}: use one currency in an agreement")


@lru_cache(maxsize=1024)
def duties_sha256(duties: tuple[Duty, ...]) -> str:
    """A digest of what uses are worth. It stays the same when a field with a default is added to a duty."""
    said = [duty.model_dump(mode="json", exclude_defaults=True) for duty in duties]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


Effect = Literal["permit", "prohibit", "require"]
"""A prohibition overrides permissions. What is required takes part in a request, or the request is refused."""


class Agreement(Document):
    """What an owner permits or prohibits to tenants, or what must take part in their requests.

    `purposes` or `regions` of None mean all of them; an empty collection is refused, because it
    could be read either way. Duties are executed for every use that counts under the agreement. Only permissions have
    any; a stored one with a duty that cannot be executed permits nothing. A requirement permits nothing either.
    """

    id: AgreementIdField
    version: Annotated[int, Field(ge=1)] = 1
    owner: OwnerIdField
    experts: Annotated[SetOf[ExpertReference], Field(min_length=1), AfterValidator(_without_public)]
    assignee: Assignee
    effect: Effect
    purposes: Annotated[SetOf[PurposeField], Field(min_length=1)] | None = None
    regions: Annotated[SetOf[RegionField], Field(min_length=1)] | None = None
    not_before: Moment | None = None
    not_after: Moment | None = None
    duties: ListOf[Duty] = ()
    license_expression: LicenseExpression | None = None
    terms_uri: Annotated[str, StringConstraints(pattern=r"^https://\S{1,2000}$")] | None = None
    terms_sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")] | None = None

    @field_validator("duties")
    @classmethod
    def _are_executed(cls, duties: tuple[Duty, ...], info: ValidationInfo) -> tuple[Duty, ...]:
        if info.context != STORED:
            require_executed(duties, info.data.get("effect", "permit"))
        return duties

    @model_validator(mode="after")
    def _ends_after_it_starts(self) -> Agreement:
        if self.starts >= self.ends:
            raise InvalidName("'not_after' must be later than 'not_before'")
        return self

    @property
    def executed(self) -> bool:
        """Whether all of its duties can be executed."""
        try:
            require_executed(self.duties)
        except InvalidName:
            return False
        return True

    @property
    def starts(self) -> float:
        """Unix seconds of the first moment in force; -inf without `not_before`."""
        return self.not_before.timestamp() if self.not_before else -math.inf

    @property
    def ends(self) -> float:
        """Unix seconds of the first moment no longer in force; inf without `not_after`."""
        return self.not_after.timestamp() if self.not_after else math.inf
