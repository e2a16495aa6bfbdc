"""What operators, owners and clients write has the very types that the published schema says: nothing is guessed."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from typing import Any, Final

import pytest
from jsonschema import Draft202012Validator, FormatChecker
from pydantic import BaseModel, ValidationError

from flexgate.experts.package.manifest import Manifest
from flexgate.policies.field_errors import NOT_SUPPORTED, NOT_WRITTEN, PATTERNS, first_field_error
from flexgate.policies.store.gitops import PolicyFile
from flexgate.server.admin.operations import OPERATIONS
from flexgate.server.experts.schemas import AddBody, UploadBody

DIGEST: Final = "0" * 64
AGREEMENT: Final[dict[str, Any]] = {
    "id": "a",
    "version": 2,
    "owner": "wire",
    "experts": ["news"],
    "assignee": "everyone",
    "effect": "prohibit",
    "purposes": ["search"],
    "regions": ["DE-BY"],
    "not_before": "2026-01-01T00:00:00Z",
    "not_after": "2027-12-31T00:00:00+01:00",
    "license_expression": "CC-BY-4.0",
    "terms_uri": "https://example.org/terms",
    "terms_sha256": DIGEST,
}
QUOTA: Final = {
    "requests_per_minute": 1,
    "tokens_per_minute": 2,
    "concurrent_requests": 3,
    "tokens_per_day": 9,
    "tokens_per_month": 9,
    "requests_per_day": 9,
    "requests_per_month": 9,
    "cost_per_day": {"amount": "1.50", "currency": "EUR"},
    "cost_per_month": {"amount": "20", "currency": "EUR"},
    "total_tokens": None,
}
OWN_FIELDS: Final[dict[str, Any]] = {
    "groups": ["press"],
    "purposes": ["search"],
    "regions": ["DE"],
    "default_experts": ["news"],
    "anchor_optional": False,
    "min_grade": "router",
    "hidden": ["math"],
    "listed": ["news"],
}
POLICY: Final[dict[str, Any]] = {
    "format": "flexgate-policy/v1",
    "hidden_experts": ["math"],
    "required_experts": ["news"],
    "expert_sets": [{"id": "set:one", "experts": ["news"]}],
    "tenants": [
        {
            **OWN_FIELDS,
            "id": "t",
            "name": "T",
            "mode": "deny_list",
            "expert_ids": ["news"],
            "quota": QUOTA,
            "key_quotas": {"key_1": QUOTA},
            "archived": False,
        }
    ],
    "agreements": [AGREEMENT],
}
MANIFEST: Final[dict[str, Any]] = {
    "id": "news",
    "version": 1,
    "owner": "wire",
    "owner_name": "The Wire",
    "domain": "news",
    "training": {"data": "own", "documents": 1, "tokens": 2, "router": "own", "recipe": {"steps": "10"}},
    "licence": {"license_expression": "MIT", "purposes": ["search"], "regions": ["EU"], "terms_sha256": DIGEST},
    "evaluation": [{"name": "loss", "value": 1.5, "unit": "nats", "on": "held-out text"}],
    "format": "flexgate-expert/1",
    "base": {
        "architecture": {
            "vocab_size": 8,
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "rope_theta": 10000.0,
            "rms_norm_eps": 1e-6,
            "norm_topk_prob": True,
        },
        "dtype": "F32",
        "digest": DIGEST,
        "tensors": {"a": DIGEST},
    },
    "weights": {"digest": DIGEST, "bytes": 4, "tensors": {"a": DIGEST}},
}
LIMITS: Final = {
    "max_requests_per_1_minute": 1,
    "max_tokens_per_1_minute": 2,
    "max_concurrent_requests": 3,
    "max_tokens_per_1_day": 5,
    "max_tokens_per_1_month": 6,
    "max_total_tokens": 4,
}
WRITTEN: Final[dict[str, Any]] = {
    "PolicyFile": POLICY,
    "Manifest": MANIFEST,
    "AgreementBody": AGREEMENT,
    "CreateProject": {"name": "T", "flexgate": OWN_FIELDS},
    "UpdateProject": {"name": "T", "flexgate": OWN_FIELDS},
    "ExpertPermissions": {"mode": "allow_list", "expert_ids": ["news"]},
    "CreateServiceAccount": {"name": "T", "expires_in_seconds": 60, "create_service_account_only": False},
    "CreateAdminKey": {"name": "T", "expires_in_seconds": 60, "role": "owner", "owner_id": "wire"},
    "UpdateRateLimit": LIMITS,
    "Simulate": {"policy": POLICY, "prune": True},
    "Apply": {"policy": POLICY, "prune": True, "dry_run": True},
    "TrimAuditLogs": {"older_than_days": 90},
    "RollBack": {"version": 1, "confirm": 2},
    "AddBody": {"package": "news"},
    "CreateSet": {"id": "set:one", "experts": ["news"]},
    "ChangeSet": {"experts": ["news"]},
    "CloseMonth": {"owner_id": "wire", "minimums": [{"amount": "50", "currency": "EUR"}]},
    "AddCorrection": {
        "kind": "correction",
        "receipt_id": "dec_1",
        "reason": "counted twice",
        "id": "correction-1",
        "owner_id": "wire",
        "amount": "-1.50",
        "currency": "EUR",
        "dispute_id": "dispute-1",
    },
    "UploadBody": {"files": {"manifest.json": 10}},
}
MODELS: Final[dict[str, type[BaseModel]]] = {
    **{o.body.__name__: o.body for o in OPERATIONS if o.body.model_fields},
    **{model.__name__: model for model in (PolicyFile, Manifest, AddBody, UploadBody)},
}
VALUES: Final[tuple[Any, ...]] = (
    None,
    True,
    0,
    1,
    20271231,
    1.0,
    1.5,
    float("nan"),
    "",
    "x",
    "1",
    "yes",
    "true",
    "20271231",
    "2027-12-31",
    [],
    ["news"],
    [1],
    {},
    {"id": "x"},
)

UNTOLD: Final = {NOT_SUPPORTED, NOT_WRITTEN}
"""What is said of an error without a sentence of its own."""

formats: Final = FormatChecker(())


@formats.checks("date-time")
def _is_a_time(value: object) -> bool:
    return not isinstance(value, str) or re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", value) is not None


def _places(value: Any, *path: Any) -> Iterator[tuple[Any, ...]]:
    yield path
    steps = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, inner in steps:
        yield from _places(inner, *path, step)


def _with(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    changed = copy.deepcopy(document)
    place = changed
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return changed


def test_every_body_is_tried_here() -> None:
    assert MODELS.keys() == WRITTEN.keys()


@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_accepted_that_the_schema_refuses(name: str) -> None:
    model, document = MODELS[name], WRITTEN[name]
    schema = Draft202012Validator(model.model_json_schema(), format_checker=formats)
    schema.validate(document)
    model.model_validate(document)
    tried = 0
    for path in _places(document):
        for value in VALUES if path else ():
            changed = _with(document, path, value)
            try:
                model.model_validate(changed)
            except ValidationError:
                continue
            tried += 1
            assert schema.is_valid(changed), (path, value)
    assert tried


@pytest.mark.parametrize("name", MODELS)
def test_what_is_wrong_is_said_in_words_of_ours(name: str) -> None:
    """Of every kind of error that a wrong value makes: no sentence of pydantic's, which names Python's types."""
    model, document = MODELS[name], WRITTEN[name]
    told = set()
    for path in _places(document):
        for value in (*VALUES, "\n", -1, "x" * 3000, ["x"] * 400) if path else ():
            try:
                model.model_validate(_with(document, path, value))
            except ValidationError as error:
                found, theirs = first_field_error(error), error.errors()[0]
                told.add(found.kind)
                assert found.whole == (found.kind == "value_error"), theirs
                assert found.whole or theirs["msg"].lower() not in found.sentence("it").lower()
                assert found.says not in UNTOLD, theirs
    assert told


def test_every_pattern_of_a_field_has_words() -> None:
    schemas = json.dumps([model.model_json_schema() for model in MODELS.values()])
    assert {json.loads(text) for text in re.findall(r'"pattern": ("(?:[^"\\]|\\.)*")', schemas)} <= PATTERNS.keys()


@pytest.mark.parametrize("field", ["not_before", "not_after"])
@pytest.mark.parametrize("value", [20271231, 20271231.0, "20271231", "2027-12-31", True, "2027-12-31 00:00:00Z"])
def test_only_a_written_time_is_a_time(field: str, value: Any) -> None:
    with pytest.raises(ValidationError, match="is not a time: write it as '2026-11-23T00:00:00Z'"):
        MODELS["AgreementBody"].model_validate({**AGREEMENT, "not_before": None, field: value})
