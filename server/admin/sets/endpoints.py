"""`/v1/expert_sets`: named sets of experts, as agreements, projects and requests name them."""

from __future__ import annotations

from typing import Final

from flexgate.policies.documents import Role
from flexgate.policies.store import sets
from flexgate.server.admin.operation import Call, Nothing, Page, Written
from flexgate.server.admin.pages import page_of
from flexgate.server.admin.router import OperationRouter
from flexgate.server.admin.sets.schemas import ChangeSet, CreateSet, SetDeleted, SetObject, SetPage, set_object

_ALL: Final = "/v1/expert_sets"
_ONE: Final = f"{_ALL}/{{set_id}}"
_READ: Final = (Role.ADMIN, Role.AUDITOR)
_ADMIN: Final = (Role.ADMIN,)
router: Final = OperationRouter()


@router.operation("GET", _ALL, roles=_READ)
def list_(call: Call[Nothing, Page]) -> SetPage:
    """List the sets of experts, oldest first."""
    chosen, more = page_of(sets.list_sets(call.store), call.query, lambda found: found.id)
    return SetPage.of([set_object(found) for found in chosen], more=more)


@router.operation("POST", _ALL, roles=_ADMIN)
def create(call: Call[CreateSet, Written]) -> SetObject:
    """Create a set of experts."""
    return set_object(sets.create_set(call.store, call.body.id, call.body.experts, **call.attributed))


@router.operation("GET", _ONE, roles=_READ)
def retrieve(call: Call[Nothing, Nothing]) -> SetObject:
    """Show one set."""
    return set_object(sets.get_set(call.store, call.path["set_id"]))


@router.operation("POST", _ONE, roles=_ADMIN)
def change(call: Call[ChangeSet, Written]) -> SetObject:
    """Replace the experts of a set, and so of whatever names it."""
    return set_object(sets.change_set(call.store, call.path["set_id"], call.body.experts, **call.attributed))


@router.operation("DELETE", _ONE, roles=_ADMIN)
def delete(call: Call[Nothing, Written]) -> SetDeleted:
    """Delete a set. One that is named somewhere is not deleted."""
    sets.delete_set(call.store, call.path["set_id"], **call.attributed)
    return SetDeleted(id=call.path["set_id"])
