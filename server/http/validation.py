"""Bodies and query strings as closed, typed fields.

Query strings come as OpenAI's clients write them: `name=v`, `names[]=v&names[]=w`, `range[gte]=1`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Final, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.requests import Request

from flexgate.server.http.body import Bodies, announces_body, read_request
from flexgate.server.http.errors import Invalid, from_validation
from flexgate.server.http.long_requests import identify_again

M = TypeVar("M", bound=BaseModel)
_UNKNOWN: Final = "is not a query parameter of this route"
_KEY: Final = re.compile(r"([a-z_]{1,40})(?:\[([a-z]{0,10})\])?")


class Closed(BaseModel):
    """Base of bodies and queries: a misspelt field is refused, not ignored, and so is a value of another type."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


async def read_body(request: Request, services: Bodies, model: type[M]) -> M:
    """The request's body as `model`, or none where that has no fields; raises `ApiError` naming the field at fault."""
    optional = not model.model_fields
    if optional and not announces_body(request.headers):
        return model()
    raw = await read_request(request, services, optional=optional)
    await identify_again(request, services)
    return await services.offload.run(validated, model, raw)


def validated(model: type[M], values: Any) -> M:
    """`values` as `model`; raises `Invalid` naming the field at fault."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise from_validation(error) from None


def parse_query(pairs: Iterable[tuple[str, str]], model: type[M]) -> M:
    """The parameters as `model`; raises `Invalid` naming the one at fault."""
    values: dict[str, Any] = {}
    for key, value in pairs:
        _put(values, key, value)
    try:
        return model.model_validate(values, strict=False)  # strings are the only type that a query has
    except ValidationError as error:
        raise from_validation(error, unknown=_UNKNOWN) from None


def _put(values: dict[str, Any], key: str, value: str) -> None:
    parts = _KEY.fullmatch(key)
    if parts is None:
        raise Invalid(f"{_shown(key)} {_UNKNOWN}.", param=None, code="unknown_parameter")
    name, inner = parts.groups()
    if not value.isprintable():
        raise Invalid(f"'{name}' has characters that do not print.", param=name, code="invalid_value")
    if inner is None:
        fits = name not in values
        values[name] = value
    elif inner == "":
        fits = isinstance(values.setdefault(name, []), list)
        if fits:
            values[name].append(value)
    else:
        fits = isinstance(values.setdefault(name, {}), dict) and inner not in values[name]
        if fits:
            values[name][inner] = value
    if not fits:
        raise Invalid(f"'{name}' is given twice. Give it once.", param=name, code="invalid_value")


def _shown(key: str) -> str:
    """A name that a client made up, in ASCII and cut off."""
    return ascii(key if len(key) <= 80 else key[:77] + "...")
