"""Lists in OpenAI's shape, cut into pages by the id of the last object seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from flexgate.server.admin.operation import Json, Page
from flexgate.server.http.errors import Invalid

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


def list_object(data: Sequence[dict[str, Any]], has_more: bool) -> Json:
    """The list as it is answered."""
    return {
        "object": "list",
        "data": list(data),
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": has_more,
    }


def unknown_cursor(param: str) -> Invalid:
    """A cursor that is not in the list."""
    return Invalid(f"'{param}' names no object of this list.", param=param, code="invalid_value")
