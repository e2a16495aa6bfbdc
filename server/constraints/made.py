"""The constraint of an engine request, as vLLM's handlers made it of tools, formats and options."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from flexgate.server.constraints.schemas import enforceable

if TYPE_CHECKING:
    from vllm.sampling_params import StructuredOutputsParams


def enforced(params: StructuredOutputsParams) -> StructuredOutputsParams:
    """The same parameters with their JSON schemas as the compiler keeps to them; raises `Unenforceable`."""
    if params.json is not None:
        return replace(params, json=_dumped(enforceable(_loaded(params.json))))
    if params.structural_tag is not None:
        return replace(params, structural_tag=_dumped(_with_enforced(_loaded(params.structural_tag))))
    return params


def _with_enforced(tag: Any) -> Any:
    """A structural tag, which a tool parser's own format makes, with the schemas in it as `enforceable` writes them."""
    if isinstance(tag, list):
        return [_with_enforced(item) for item in tag]
    if not isinstance(tag, dict):
        return tag
    return {name: enforceable(item) if name == "json_schema" else _with_enforced(item) for name, item in tag.items()}


def _loaded(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


def _dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
