"""The `flexgate` object and headers."""

from __future__ import annotations

import json
from typing import NamedTuple

import pytest

from flexgate.policies.decide import decide
from flexgate.policies.decision import Decision, DecisionRequest
from flexgate.policies.snapshot import Snapshot
from flexgate.server.inference.attribution import GateViolated, attribution_object
from flexgate.server.inference.response_metadata import headers, metadata


class Use(NamedTuple):
    expert: str
    mass: int
    tokens: int

    @property
    def gate_mass(self) -> float:
        return float(self.mass)


@pytest.fixture
def decision(snapshot: Snapshot) -> Decision:
    return decide(snapshot, "t", DecisionRequest(decision_id="dec_1"), 100.0)


def test_every_listed_expert_has_a_part_and_hidden_ones_are_not_named(snapshot: Snapshot, decision: Decision) -> None:
    uses = [Use("public", 3, 4), Use("news", 1, 2), Use("math", 0, 0), Use("secret", 0, 0)]
    assert attribution_object(snapshot, decision, uses, 5) == {
        "method": "gate_mass/v1",
        "cached_prompt_tokens": 5,
        "experts": [
            {
                "id": "public",
                "owner": "commons",
                "grade": "unknown",
                "gate_mass": 3.0,
                "share_ppm": 750_000,
                "tokens": 4,
            },
            {
                "id": "news",
                "owner": "gazette",
                "grade": "removed",
                "gate_mass": 1.0,
                "share_ppm": 250_000,
                "tokens": 2,
            },
            {"id": "math", "owner": "academy", "grade": "router", "gate_mass": 0.0, "share_ppm": 0, "tokens": 0},
        ],
    }


def test_what_no_gate_reaches_is_said_and_has_no_share(snapshot: Snapshot, decision: Decision) -> None:
    uses, ungated = [Use("public", 1, 4)], {"shared_expert": True, "dense_layers": 2}
    shown = attribution_object(snapshot, decision, uses, 0, ungated=ungated)
    assert shown == attribution_object(snapshot, decision, uses, 0) | ungated


def test_parts_are_in_the_order_of_their_shares(snapshot: Snapshot, decision: Decision) -> None:
    uses = [Use("public", 1, 4), Use("news", 3, 2)]
    parts = attribution_object(snapshot, decision, uses, 0)["experts"]
    assert [part["id"] for part in parts] == ["news", "public", "math"]


def test_an_expert_that_the_engine_does_not_name_has_zeros(snapshot: Snapshot, decision: Decision) -> None:
    parts = attribution_object(snapshot, decision, [], 0)["experts"]
    assert [(p["gate_mass"], p["share_ppm"], p["tokens"]) for p in parts] == [(0.0, 0, 0)] * 3


@pytest.mark.parametrize("use", [Use("math", 1, 0), Use("secret", 0, 1), Use("ghost", 1, 1)])
def test_an_answer_that_used_another_expert_is_withheld(snapshot: Snapshot, decision: Decision, use: Use) -> None:
    with pytest.raises(GateViolated):
        attribution_object(snapshot, decision, [use], 0)


def test_the_object_explains_the_gate(decision: Decision) -> None:
    answer = metadata(decision, weights_epoch=3, explain="reasons", attribution={"a": 1}, credits=[], max_tokens=None)
    assert answer["allowed"] == ["public", "news"]
    assert [(r["expert"], r["code"]) for r in answer["excluded"]] == [("math", "not_in_allow_list")]
    assert (answer["policy_version"], answer["weights_epoch"]) == (7, 3)
    assert answer["attribution"] == {"a": 1}
    assert "secret" not in json.dumps(answer)


def test_explain_none_leaves_the_reasons_out(decision: Decision) -> None:
    answer = metadata(decision, weights_epoch=3, explain="none", attribution=None, credits=[], max_tokens=None)
    assert answer.keys() == {"decision_id", "policy_version", "weights_epoch", "allowed"}


def test_headers_name_the_gate_and_both_versions(decision: Decision) -> None:
    assert headers(decision, 3) == {
        "x-flexgate-experts": "public,news",
        "x-flexgate-policy-version": "7",
        "x-flexgate-weights-epoch": "3",
    }
