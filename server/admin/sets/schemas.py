"""Sets of experts at the wire."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from flexgate.policies.agreements import SetOf
from flexgate.policies.documents import ExpertSet
from flexgate.policies.ids import ExpertIdField, SetIdField
from flexgate.server.admin.pages import Deleted, Identified, PageOf
from flexgate.server.http.validation import Closed


class ChangeSet(Closed):
    """The experts of a set, all of them."""

    experts: Annotated[SetOf[ExpertIdField], Field(min_length=1)]


class CreateSet(ChangeSet):
    """A new set. Its id begins with `set:`."""

    id: SetIdField


class SetObject(Identified):
    """A set of experts, usable wherever an expert may be named."""

    object: Literal["expert_set"] = "expert_set"
    experts: list[str]


class SetPage(PageOf[SetObject]):
    """A part of the list of sets."""


class SetDeleted(Deleted):
    """A set that was deleted."""

    object: Literal["expert_set.deleted"] = "expert_set.deleted"


def set_object(document: ExpertSet) -> SetObject:
    """A set."""
    return SetObject(id=document.id, experts=sorted(document.experts))
