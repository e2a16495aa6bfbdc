"""Names of experts, sets, owners, tenants, groups and agreements, each a type of its own."""

from __future__ import annotations

import re
from typing import Annotated, Final, NewType

from pydantic import AfterValidator, StringConstraints

from flexgate.policies.errors import InvalidName

ExpertId = NewType("ExpertId", str)
SetId = NewType("SetId", str)
OwnerId = NewType("OwnerId", str)
TenantId = NewType("TenantId", str)
GroupId = NewType("GroupId", str)
AgreementId = NewType("AgreementId", str)
PUBLIC: Final = ExpertId("public")
_EXPERT_ID: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_EXPERT_ID_FORM: Final = "1 to 63 characters from a-z, 0-9 and '-', beginning with a letter or digit"
_NAME_PATTERN: Final = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"


def parse_expert_id(text: str) -> ExpertId:
    """`text` as an expert id; raises `InvalidName`."""
    if _EXPERT_ID.fullmatch(text):
        return ExpertId(text)
    raise InvalidName(f"{text!r} is not an expert id; use {_EXPERT_ID_FORM}")


def parse_set_id(text: str) -> SetId:
    """`text` as the name of a set of experts (`set:…`); raises `InvalidName`."""
    if text.startswith("set:") and _EXPERT_ID.fullmatch(text[4:]):
        return SetId(text)
    raise InvalidName(f"{text!r} is not a set of experts; use 'set:' and {_EXPERT_ID_FORM}")


def _parse_reference(text: str) -> str:
    return parse_set_id(text) if text.startswith("set:") else parse_expert_id(text)


def _parse_assignee(text: str) -> str:
    kind, _, name = text.partition(":")
    if text == "everyone" or (kind in ("tenant", "group") and re.fullmatch(_NAME_PATTERN[1:-1], name)):
        return text
    raise InvalidName(f"{text!r} is not an assignee; use 'everyone', 'tenant:ID' or 'group:ID'")


ExpertIdField = Annotated[ExpertId, AfterValidator(parse_expert_id)]
SetIdField = Annotated[SetId, AfterValidator(parse_set_id)]
Name = Annotated[str, StringConstraints(pattern=_NAME_PATTERN)]
OwnerIdField = Annotated[OwnerId, StringConstraints(pattern=_NAME_PATTERN)]
TenantIdField = Annotated[TenantId, StringConstraints(pattern=_NAME_PATTERN)]
GroupIdField = Annotated[GroupId, StringConstraints(pattern=_NAME_PATTERN)]
AgreementIdField = Annotated[AgreementId, StringConstraints(pattern=_NAME_PATTERN)]
ExpertReference = Annotated[str, AfterValidator(_parse_reference)]
Assignee = Annotated[str, AfterValidator(_parse_assignee)]
