"""The request extension `{"flexgate": {…}}`: closed, so that a misspelt request filter is refused."""

from __future__ import annotations

import json
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flexgate.server.http.errors import Invalid, from_validation

FIELD: Final = "flexgate"
MAX_NAMES: Final = 256
COUNTERFACTUAL: Final = "counterfactual"

_Name = Annotated[str, Field(max_length=80)]
_Names = Annotated[tuple[_Name, ...], Field(max_length=MAX_NAMES, fail_fast=True)]


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class RequestFilter(_Closed):
    """`only` never drops `public`; `ignore` may, where the tenant's policy allows it."""

    only: _Names | None = None
    ignore: _Names = ()


class Extension(_Closed):
    """What a request may ask of the gate. It can only take experts away."""

    experts: RequestFilter = RequestFilter()
    purpose: Annotated[str, Field(max_length=80)] | None = None
    region: Annotated[str, Field(max_length=80)] | None = None
    min_policy_version: Annotated[int, Field(ge=0)] | None = None
    explain: Literal["none", "reasons", "counterfactual"] = "reasons"


def parse_extension(value: Any) -> Extension:
    """`value` as an extension; null is like a field left out, at every depth. Raises `Invalid` naming the key."""
    if value is None:
        return Extension()
    try:
        return Extension.model_validate_json(json.dumps(_without_nulls(value, depth=2)))
    except ValidationError as error:
        raise from_validation(error, FIELD) from None
    except RecursionError:
        raise Invalid(f"'{FIELD}' is nested too deeply.", param=FIELD, code="invalid_value") from None


def _without_nulls(value: Any, *, depth: int) -> Any:
    if not depth or not isinstance(value, dict):
        return value
    return {name: _without_nulls(item, depth=depth - 1) for name, item in value.items() if item is not None}
