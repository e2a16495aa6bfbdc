"""Explanations, simulations and revisions at the wire."""

from __future__ import annotations

import math
from collections import Counter
from typing import Annotated, Any

from pydantic import Field

from flexgate.policies.explain import Explanation
from flexgate.policies.simulate import Difference, Replay
from flexgate.policies.store.gitops import Plan, PolicyFile
from flexgate.policies.store.revisions import ObjectChange, Revision
from flexgate.server.admin.operation import Json
from flexgate.server.http.refusals import reason_json
from flexgate.server.http.validation import Closed

Version = Annotated[int, Field(ge=0, le=10**15)]


class Explain(Closed):
    """A project's own key may leave `project_id` out."""

    project_id: str | None = None
    purpose: str | None = None
    region: str | None = None


class Simulate(Closed):
    """A policy file's content. With `prune`, what it does not name would go."""

    policy: PolicyFile
    prune: bool = False


class Apply(Simulate):
    """With `dry_run` everything is checked and nothing changed."""

    dry_run: bool = False


class Export(Closed):
    """As it was at a version, or as it is."""

    version: Version | None = None


class Compare(Closed):
    """Two policy versions."""

    old: Version
    new: Version


class RollBack(Closed):
    """The version whose policy comes back; `confirm` is the present one.

    Without it nothing is changed, and the refusal says what would be.
    """

    version: Version
    confirm: Version | None = None


def explanation_object(explanation: Explanation) -> Json:
    """One expert. `until` is null where nothing ends it."""
    until = explanation.until
    return {
        "expert": explanation.expert,
        "allowed": explanation.refused is None,
        "permitted_by": list(explanation.permitted_by),
        "until": None if until is None or until == math.inf else int(until),
        "reason": None if explanation.refused is None else reason_json(explanation.refused),
    }


def difference_object(difference: Difference) -> Json:
    """What would change for one decision sample, and how many requests it stands for."""
    request = difference.replay.request
    return {
        "project_id": difference.replay.tenant_id,
        "purpose": request.purpose,
        "region": request.region,
        "only": None if request.only is None else list(request.only),
        "ignore": list(request.ignore),
        "requests": difference.replay.times,
        "gained": list(difference.gained),
        "lost": list(difference.lost),
        "refused_before": difference.refused_before,
        "refused_after": difference.refused_after,
    }


def simulation_object(plan: Plan, replays: list[Replay], differences: list[Difference]) -> Json:
    """What a plan would change. `unfiltered_samples` counts, by project, the replayed samples without a filter."""
    return {
        "object": "policy.simulation",
        "policy_version": plan.current.policy_version,
        "changes": [change_object(change) for change in plan.changes],
        "replayed": len(replays),
        "unfiltered_samples": Counter(replay.tenant_id for replay in replays if not replay.request.filters),
        "differences": [difference_object(difference) for difference in differences],
    }


def change_object(change: ObjectChange) -> Json:
    """One object before and after."""
    return {"kind": change.kind, "id": change.object_id, "before": change.before, "after": change.after}


def revision_object(revision: Revision) -> dict[str, Any]:
    """Who changed the policy, when and why."""
    return {
        "id": str(revision.version),
        "object": "policy.revision",
        "version": revision.version,
        "created_at": int(revision.at),
        "actor": revision.actor,
        "note": revision.note,
    }
