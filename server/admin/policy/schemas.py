"""Explanations, simulations and revisions at the wire."""

from __future__ import annotations

import math
from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import Field

from flexgate.policies.documents import Grade
from flexgate.policies.errors import DecisionRefused
from flexgate.policies.explain import Explanation
from flexgate.policies.simulate import Difference, Replay
from flexgate.policies.store.gitops import Plan, PolicyFile
from flexgate.policies.store.revisions import ObjectChange, Revision
from flexgate.server.admin.pages import Identified, PageOf
from flexgate.server.http.refusals import from_policy, reason_json
from flexgate.server.http.schemas import Reason, Shown, is_none
from flexgate.server.http.validation import Closed

Version = Annotated[int, Field(ge=0, le=10**15)]


class Explain(Closed):
    """A project's own key may leave `project_id` out."""

    project_id: str | None = None
    purpose: str | None = None
    region: str | None = None


class Simulate(Closed):
    """The content of a policy file. `prune` also removes what it does not name."""

    policy: PolicyFile
    prune: bool = False


class Apply(Simulate):
    """The content of a policy file. `dry_run` checks everything and changes nothing."""

    dry_run: bool = False


class Export(Closed):
    """As it was at a version, or as it is."""

    version: Version | None = None


class Compare(Closed):
    """Two policy versions."""

    old: Version
    new: Version


class RollBack(Closed):
    """The version to roll back to; `confirm` is the present version.

    Without `confirm` nothing is changed, and the refusal lists what would be.
    """

    version: Version
    confirm: Version | None = None


class ExplanationObject(Shown):
    """One expert. `counts_under` is the one of `permitted_by` that uses count under, null where none is needed.

    `until` is in Unix seconds, and null where nothing ends it. `required_by` names what requires it, allowed or not.
    `grade`: what excluding it excludes.
    """

    expert: str
    grade: Grade
    allowed: bool
    permitted_by: list[str]
    counts_under: str | None
    until: int | None
    required_by: list[str]
    reason: Reason | None


class RequestRefusal(Shown):
    """The error that requests without a filter get."""

    code: str | None
    message: str


class PolicyExplanation(Shown):
    """Why a project may use what it may. Its own key is not shown what is hidden from it.

    `refusal` is null where a request without a filter is answered.
    """

    object: Literal["policy.explanation"] = "policy.explanation"
    project_id: str
    policy_version: int
    refusal: RequestRefusal | None
    experts: list[ExplanationObject]
    hidden: Annotated[list[str] | None, Field(exclude_if=is_none)] = None


class DifferenceObject(Shown):
    """What would change for one decision sample, and how many requests it stands for."""

    project_id: str
    purpose: str | None
    region: str | None
    only: list[str] | None
    ignore: list[str]
    requests: int
    gained: list[str]
    lost: list[str]
    refused_before: str | None
    refused_after: str | None


class ChangeObject(Shown):
    """One object before and after; null where there is none."""

    kind: str
    id: str
    before: dict[str, Any] | None
    after: dict[str, Any] | None


class PolicySimulation(Shown):
    """What a plan would change. `unfiltered_samples` counts, by project, the replayed samples without a filter."""

    object: Literal["policy.simulation"] = "policy.simulation"
    policy_version: int
    changes: list[ChangeObject]
    replayed: int
    unfiltered_samples: dict[str, int]
    differences: list[DifferenceObject]


class PolicyApplication(Shown):
    """What applying a file changed, or would change."""

    object: Literal["policy.application"] = "policy.application"
    changes: list[ChangeObject]


class PolicyDiff(Shown):
    """What differs between two versions."""

    object: Literal["policy.diff"] = "policy.diff"
    old: int
    new: int
    changes: list[ChangeObject]


class PolicyRollback(Shown):
    """The version that is back, and the one that says so now."""

    object: Literal["policy.rollback"] = "policy.rollback"
    version: int
    policy_version: int


class RevisionObject(Identified):
    """Who changed the policy, when and why."""

    object: Literal["policy.revision"] = "policy.revision"
    version: int
    created_at: int
    actor: str
    note: str


class RevisionPage(PageOf[RevisionObject]):
    """A part of the list of the policy's revisions."""


def explanation_object(explanation: Explanation) -> ExplanationObject:
    """One expert."""
    until = explanation.until
    return ExplanationObject(
        expert=explanation.expert,
        grade=explanation.grade,
        allowed=explanation.refused is None,
        permitted_by=list(explanation.permitted_by),
        counts_under=explanation.counts_under,
        until=None if until is None or until == math.inf else int(until),
        required_by=list(explanation.required_by),
        reason=None if explanation.refused is None else Reason(**reason_json(explanation.refused)),
    )


def refusal_object(error: DecisionRefused | None) -> RequestRefusal | None:
    """What a request is refused with."""
    return None if error is None else RequestRefusal(code=from_policy(error).code, message=str(error))


def difference_object(difference: Difference) -> DifferenceObject:
    """What would change for one decision sample."""
    request = difference.replay.request
    return DifferenceObject(
        project_id=difference.replay.tenant_id,
        purpose=request.purpose,
        region=request.region,
        only=None if request.only is None else list(request.only),
        ignore=list(request.ignore),
        requests=difference.replay.times,
        gained=list(difference.gained),
        lost=list(difference.lost),
        refused_before=difference.refused_before,
        refused_after=difference.refused_after,
    )


def simulation_object(plan: Plan, replays: list[Replay], differences: list[Difference]) -> PolicySimulation:
    """What a plan would change."""
    return PolicySimulation(
        policy_version=plan.current.policy_version,
        changes=[change_object(change) for change in plan.changes],
        replayed=len(replays),
        unfiltered_samples=dict(Counter(replay.tenant_id for replay in replays if not replay.request.filters)),
        differences=[difference_object(difference) for difference in differences],
    )


def change_object(change: ObjectChange) -> ChangeObject:
    """One object before and after."""
    return ChangeObject(kind=change.kind, id=change.object_id, before=change.before, after=change.after)


def revision_object(revision: Revision) -> RevisionObject:
    """One revision."""
    return RevisionObject(
        id=str(revision.version),
        version=revision.version,
        created_at=int(revision.at),
        actor=revision.actor,
        note=revision.note,
    )
