"""`GET /v1/openapi.json`: this API, its bodies and queries generated from what requests are checked against."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import Any, Final

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from flexgate.server.admin.operation import Nothing, Operation
from flexgate.server.admin.operations import OPERATIONS
from flexgate.server.http.context import identify
from flexgate.server.inference.request import fields
from flexgate.server.inference.request.extension import Extension
from flexgate.server.inference.request.fields import Fate, Table
from flexgate.server.lifecycle.services import Services

Json = dict[str, Any]
_SCHEMAS: Final = "#/components/schemas/"
_REFERENCE: Final = re.compile(f'"{re.escape(_SCHEMAS)}([^"]+)"')
_ERROR: Final = {"$ref": f"{_SCHEMAS}Error"}

# Path, table, fields that a request must have, and what the endpoint does.
_POSTS: Final[tuple[tuple[str, Table, tuple[str, ...], str], ...]] = (
    ("/v1/chat/completions", fields.CHAT, ("messages",), "Answer a conversation."),
    ("/v1/completions", fields.COMPLETION, ("prompt",), "Continue a text."),
    ("/v1/responses", fields.RESPONSES, ("input",), "Answer an input. Nothing is stored."),
    ("/tokenize", {**fields.TOKENIZE_PROMPT, **fields.TOKENIZE_CHAT}, (), "Text or messages as token ids."),
    ("/detokenize", fields.DETOKENIZE, ("tokens",), "Token ids as text."),
)
_GETS: Final = (
    ("/v1/models", "The names of the served model."),
    ("/v1/models/{model}", "One of its names."),
    ("/health", "Whether the process lives."),
    ("/ready", "Whether a request would be served."),
    ("/metrics", "Prometheus metrics, for administrators and auditors."),
    ("/v1/openapi.json", "This document."),
)
_OPEN: Final = ("/health", "/ready")
_TYPES: Final[Mapping[str, Json]] = {
    "model": {"type": "string"},
    "messages": {
        "type": "array",
        "items": {
            "type": "object",
            "properties": {"role": {"type": "string"}, "content": {}},
            "required": ["role"],
        },
    },
    "prompt": {"anyOf": [{"type": "string"}, {"type": "array"}]},
    "input": {"anyOf": [{"type": "string"}, {"type": "array"}]},
    "tokens": {"type": "array", "items": {"type": "integer"}},
    "stream": {"type": "boolean"},
    "n": {"type": "integer", "minimum": 1},
    **{name: {"type": "integer", "minimum": 1} for name in ("max_tokens", "max_completion_tokens")},
    **{name: {"type": "number"} for name in ("temperature", "top_p", "min_p")},
}


class OpenApi:
    """The route. Any key may read it; it says nothing about what the server holds."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._made: bytes | memoryview | None = None

    async def document(self, request: Request) -> Response:
        """The document."""
        await identify(request, self._services)
        served = frozenset(
            (method.lower(), route.path.replace(":path}", "}"))
            for route in request.app.routes
            for method in route.methods
        )
        if self._made is None:
            self._made = await self._services.offload.run_for("", lambda: JSONResponse(self._document(served)).body)
        return Response(self._made, media_type="application/json")

    @staticmethod
    def _document(served: frozenset[tuple[str, str]]) -> Json:
        whole = document()
        here = {
            path: {method: described for method, described in methods.items() if (method, path) in served}
            for path, methods in whole["paths"].items()
        }
        return _restricted(whole, {path: methods for path, methods in here.items() if methods})


def _restricted(whole: Json, paths: Json) -> Json:
    """The document of some paths: with the schemas that they lead to, and no other."""
    schemas = whole["components"]["schemas"]
    reached, waiting = set[str](), [paths]
    while waiting:
        names = set(_REFERENCE.findall(json.dumps(waiting.pop()))) - reached
        reached |= names
        waiting += [schemas[name] for name in names]
    kept = {name: schema for name, schema in schemas.items() if name in reached}
    return {**whole, "paths": paths, "components": {**whole["components"], "schemas": kept}}


def document() -> Json:
    """OpenAPI 3.1, of every route."""
    schemas: Json = {"Error": _error_schema()}
    paths: dict[str, Json] = {}
    for path, summary in _GETS:
        paths.setdefault(path, {})["get"] = _described(path, summary)
    for path, table, required, summary in _POSTS:
        body = _body(_table_schema(table, required, schemas))
        paths.setdefault(path, {})["post"] = {**_described(path, summary), "requestBody": body}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(operation, schemas)
    return {
        "openapi": "3.1.0",
        "info": {"title": "flexgate", "version": version("flexgate")},
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(operation: Operation[Any, Any], schemas: Json) -> Json:
    roles = ", ".join(operation.roles)
    summary = (operation.work.__doc__ or "").strip()
    described = _described(operation.path, summary, f"Roles: {roles}.", status=int(operation.status))
    described["parameters"] += _query_parameters(operation.query, schemas)
    if operation.body is not Nothing:
        described["requestBody"] = _body(_model_schema(operation.body, schemas))
    return described


def _described(path: str, summary: str, description: str = "", *, status: int = 200) -> Json:
    names = re.findall(r"{(\w+)}", path)
    parameters = [{"name": n, "in": "path", "required": True, "schema": {"type": "string"}} for n in names]
    refused = {"description": "Refused.", "content": {"application/json": {"schema": _ERROR}}}
    return {
        "summary": summary.partition("\n")[0],
        "description": description,
        "parameters": parameters,
        "security": [] if path in _OPEN else [{"key": []}],
        "responses": {str(status): {"description": "Done."}, "4XX": refused, "503": refused},
    }


def _query_parameters(model: type[BaseModel], schemas: Json) -> Iterable[Json]:
    schema = model.model_json_schema(ref_template=f"{_SCHEMAS}{{model}}")
    schemas.update(schema.pop("$defs", {}))
    for name, of in schema.get("properties", {}).items():
        many = "list" in str(model.model_fields[name].annotation)
        nested = "$ref" in of or "allOf" in of
        yield {
            "name": f"{name}[]" if many else name,
            "in": "query",
            "required": name in schema.get("required", ()),
            "schema": of,
            **({"style": "deepObject", "explode": True} if nested else {}),
        }


def _model_schema(model: type[BaseModel], schemas: Json) -> Json:
    schema = model.model_json_schema(ref_template=f"{_SCHEMAS}{{model}}")
    schemas.update(schema.pop("$defs", {}))
    schemas[model.__name__] = schema
    return {"$ref": f"{_SCHEMAS}{model.__name__}"}


def _table_schema(table: Table, required: tuple[str, ...], schemas: Json) -> Json:
    """The fields that are honoured or ignored; all others are refused by name."""
    known = [name for name, rule in table.items() if rule.fate is not Fate.REFUSED]
    properties: Json = {name: _TYPES.get(name, {}) for name in known}
    if "flexgate" in properties:
        properties["flexgate"] = _model_schema(Extension, schemas)
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


def _body(schema: Json) -> Json:
    return {"required": True, "content": {"application/json": {"schema": schema}}}


def _error_schema() -> Json:
    text = {"type": ["string", "null"]}
    inner = {"message": {"type": "string"}, "type": {"type": "string"}, "param": text, "code": text}
    error = {"type": "object", "properties": inner, "required": list(inner), "additionalProperties": False}
    return {"type": "object", "properties": {"error": error, "flexgate": {"type": "object"}}, "required": ["error"]}
