"""`/v1/policy`: why a project gets what it gets, what a change would do, and what was changed."""

from __future__ import annotations

from typing import Final

from flexgate.policies import explain as explaining
from flexgate.policies import simulate as simulating
from flexgate.policies.decision import DecisionRequest
from flexgate.policies.documents import Role
from flexgate.policies.errors import ContextRefused
from flexgate.policies.ids import TenantId
from flexgate.policies.simulate import with_standard
from flexgate.policies.store import decision_samples, gitops, history
from flexgate.server.admin.operation import Call, Json, Nothing, Page, Written
from flexgate.server.admin.pages import unknown_cursor
from flexgate.server.admin.policy.schemas import (
    Apply,
    Compare,
    Explain,
    Export,
    PolicyApplication,
    PolicyDiff,
    PolicyExplanation,
    PolicyRollback,
    PolicySimulation,
    RevisionPage,
    RollBack,
    Simulate,
    change_object,
    explanation_object,
    refusal_object,
    revision_object,
    simulation_object,
)
from flexgate.server.admin.router import OperationRouter
from flexgate.server.http.errors import Invalid
from flexgate.server.http.refusals import not_found

_READ: Final = (Role.ADMIN, Role.AUDITOR)
_EXPLAIN: Final = (Role.ADMIN, Role.AUDITOR, Role.TENANT)
_ADMIN: Final = (Role.ADMIN,)
router: Final = OperationRouter()


@router.operation("GET", "/v1/policy/explain", roles=_EXPLAIN)
def explain(call: Call[Nothing, Explain]) -> PolicyExplanation:
    """Explain for every listed expert why a project may use it, or why not and what to do.

    `refusal` says why requests without a filter are refused, if they are.
    """
    project_id = _project(call)
    request = DecisionRequest(decision_id="explain", purpose=call.query.purpose, region=call.query.region)
    try:
        found = explaining.explain(call.snapshot, project_id, request, call.now)
    except ContextRefused as error:  # a query has no 'flexgate' around its parameters
        raise ContextRefused(str(error), param=(error.param or "").removeprefix("flexgate.")) from None
    hidden = None
    if call.principal.tenant_id is None:
        concealed = call.snapshot.hidden_from(call.snapshot.tenants[TenantId(project_id)], call.now)
        hidden = [str(expert) for expert in call.snapshot.experts if expert in concealed]
    return PolicyExplanation(
        project_id=project_id,
        policy_version=call.snapshot.policy_version,
        refusal=refusal_object(found.refused),
        experts=[explanation_object(explanation) for explanation in found.experts],
        hidden=hidden,
    )


@router.operation("POST", "/v1/policy/simulate", roles=_ADMIN)
def simulate(call: Call[Simulate, Nothing]) -> PolicySimulation:
    """Show which projects would gain or lose which experts if a policy file were applied. Changes nothing.

    Replays the decision samples of recent requests, and a request without filter for every active project.
    """
    call.services.samples.flush()
    plan = gitops.plan(call.store, call.body.policy, prune=call.body.prune)
    replays = with_standard(
        decision_samples.replays(call.store.engine, call.now), plan.current, plan.proposed, call.now
    )
    differences = simulating.simulate(plan.current, plan.proposed, replays)
    return simulation_object(plan, replays, differences)


@router.operation("GET", "/v1/policy/file", roles=_READ, response=gitops.PolicyFile)
def export(call: Call[Nothing, Export]) -> Json:
    """Export the policy as the content of a file. Applying it again changes nothing."""
    return gitops.export(call.store, call.query.version)


@router.operation("POST", "/v1/policy/apply", roles=_ADMIN)
def apply(call: Call[Apply, Written]) -> PolicyApplication:
    """Apply a policy file as one revision, and return what changed. On any error nothing is changed."""
    body = call.body
    if body.dry_run:
        changes = gitops.plan(call.store, body.policy, prune=body.prune).changes
    else:
        changes = gitops.apply(call.store, body.policy, prune=body.prune, **call.attributed)
    return PolicyApplication(changes=[change_object(change) for change in changes])


@router.operation("GET", "/v1/policy/revisions", roles=_READ)
def revisions(call: Call[Nothing, Page]) -> RevisionPage:
    """List the revisions of the policy, newest first."""
    before = _cursor(call.query.after)
    found = history.newest_revisions(call.store, before=before, limit=call.query.limit + 1)
    chosen = [revision_object(revision) for revision in found[: call.query.limit]]
    return RevisionPage.of(chosen, more=len(found) > len(chosen))


@router.operation("GET", "/v1/policy/diff", roles=_READ)
def diff(call: Call[Nothing, Compare]) -> PolicyDiff:
    """Compare two versions of the policy, object by object."""
    old, new = call.query.old, call.query.new
    changes = history.diff(call.store, old, new)
    return PolicyDiff(old=old, new=new, changes=[change_object(change) for change in changes])


@router.operation("POST", "/v1/policy/rollback", roles=_ADMIN)
def roll_back(call: Call[RollBack, Written]) -> PolicyRollback:
    """Roll the policy back to a version, as a new revision.

    Revoked keys stay revoked, archived projects archived. The present version in `confirm` says that it is meant.
    """
    version = history.roll_back(call.store, call.body.version, confirm=call.body.confirm, **call.attributed)
    return PolicyRollback(version=call.body.version, policy_version=version)


def _project(call: Call[Nothing, Explain]) -> str:
    own = call.principal.tenant_id
    requested = call.query.project_id if call.query.project_id is not None else own
    if requested is None:
        raise Invalid("'project_id' is required with this key.", param="project_id", code="missing_parameter")
    if own not in (None, requested):
        raise not_found()
    return requested


def _cursor(after: str | None) -> int | None:
    if after is None:
        return None
    if not after.isascii() or not after.isdigit() or len(after) > 15:
        raise unknown_cursor("after")
    return int(after)
