"""Lists in OpenAI's shape, cut into pages by the id of the last object seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, Literal, Self, TypeVar

from flexgate.server.admin.operation import Page
from flexgate.server.http.errors import Invalid
from flexgate.server.http.schemas import Shown

T = TypeVar("T")


def page_of(items: Sequence[T], query: Page, id_of: Callable[[T], str]) -> tuple[Sequence[T], bool]:
    """The items of one page, and whether more follow; raises `Invalid` for an unknown `after`."""
    first = 0
    if query.after is not None:
        places = (place for place, item in enumerate(items) if id_of(item) == query.after)
        first = next(places, -1) + 1
        if first == 0:
            raise unknown_cursor("after")
    chosen = items[first : first + query.limit]
    return chosen, first + len(chosen) < len(items)


class Identified(Shown):
    """An object that a list can go on after."""

    id: str


class Deleted(Identified):
    """An object that is no more."""

    deleted: Literal[True] = True


Listed = TypeVar("Listed", bound=Identified)


class PageOf(Shown, Generic[Listed]):
    """A part of a list; `last_id` is what the next part comes after."""

    object: Literal["list"] = "list"
    data: list[Listed]
    first_id: str | None
    last_id: str | None
    has_more: bool

    @classmethod
    def of(cls, data: list[Listed], *, more: bool) -> Self:
        """These objects, and whether more follow."""
        first, last = (data[0].id, data[-1].id) if data else (None, None)
        return cls(data=data, first_id=first, last_id=last, has_more=more)


def unknown_cursor(param: str) -> Invalid:
    """A cursor that is not in the list."""
    return Invalid(
        f"'{param}' is not the id of an object in this list. Use the 'last_id' of the previous page.",
        param=param,
        code="invalid_value",
    )
