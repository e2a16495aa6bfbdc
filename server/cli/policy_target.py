"""What `flexgate policy` asks of the policy database, or of a running server; objects are JSON as over HTTP."""

from __future__ import annotations

import time
from typing import Any, Protocol

from flexgate.experts.cli.api import Api
from flexgate.policies.decision import DecisionRequest
from flexgate.policies.explain import explain
from flexgate.policies.simulate import simulate, with_standard
from flexgate.policies.store import decision_samples, gitops, history
from flexgate.policies.store.gitops import PolicyFile
from flexgate.policies.store.store import Store
from flexgate.server.admin.policy.schemas import change_object, explanation_object, refusal_object, simulation_object
from flexgate.server.cli.store import actor

Json = dict[str, Any]


class PolicyTarget(Protocol):
    """A place with a policy."""

    def export_policy(self, version: int | None) -> Json:
        """The policy as a file's content, as it is or as it was."""

    def plan_policy(self, file: PolicyFile, *, prune: bool) -> list[Json]:
        """What applying a file would change."""

    def apply_policy(self, file: PolicyFile, *, prune: bool) -> list[Json]:
        """Apply a file, in one revision; what changed."""

    def roll_back(self, version: int, confirm: int | None) -> int:
        """Roll the policy back to a version; returns the new version."""

    def explain(self, project_id: str, purpose: str | None, region: str | None) -> Json:
        """Why a tenant may use each expert or not (``experts``), and why its requests are refused (``refusal``)."""

    def simulate(self, file: PolicyFile, *, prune: bool) -> Json:
        """What applying a file would change for requests."""


class DatabasePolicy:
    """The policy database; changes are attributed to the user of this machine."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def export_policy(self, version: int | None) -> Json:
        return gitops.export(self._store, version)

    def plan_policy(self, file: PolicyFile, *, prune: bool) -> list[Json]:
        return [change_object(change).model_dump() for change in gitops.plan(self._store, file, prune=prune).changes]

    def apply_policy(self, file: PolicyFile, *, prune: bool) -> list[Json]:
        changes = gitops.apply(self._store, file, actor=actor(), at=time.time(), prune=prune)
        return [change_object(change).model_dump() for change in changes]

    def roll_back(self, version: int, confirm: int | None) -> int:
        return history.roll_back(self._store, version, confirm=confirm, actor=actor(), at=time.time())

    def explain(self, project_id: str, purpose: str | None, region: str | None) -> Json:
        request = DecisionRequest(decision_id="explain", purpose=purpose, region=region)
        found = explain(self._store.snapshot(), project_id, request, time.time())
        refused = refusal_object(found.refused)
        return {
            "refusal": None if refused is None else refused.model_dump(),
            "experts": [explanation_object(explanation).model_dump() for explanation in found.experts],
        }

    def simulate(self, file: PolicyFile, *, prune: bool) -> Json:
        plan, now = gitops.plan(self._store, file, prune=prune), time.time()
        replays = with_standard(decision_samples.replays(self._store.engine, now), plan.current, plan.proposed, now)
        return simulation_object(plan, replays, simulate(plan.current, plan.proposed, replays)).model_dump()


class ServerPolicy:
    """A running server, which attributes changes to the key."""

    def __init__(self, api: Api) -> None:
        self._api = api

    def export_policy(self, version: int | None) -> Json:
        return self._api.ask("GET", "/v1/policy/file", params={} if version is None else {"version": version})

    def plan_policy(self, file: PolicyFile, *, prune: bool) -> list[Json]:
        return self._apply(file, prune, dry_run=True)

    def apply_policy(self, file: PolicyFile, *, prune: bool) -> list[Json]:
        return self._apply(file, prune, dry_run=False)

    def roll_back(self, version: int, confirm: int | None) -> int:
        body = {"version": version, **({} if confirm is None else {"confirm": confirm})}
        return int(self._api.ask("POST", "/v1/policy/rollback", json=body)["policy_version"])

    def explain(self, project_id: str, purpose: str | None, region: str | None) -> Json:
        given = {"project_id": project_id, "purpose": purpose, "region": region}
        query = {name: value for name, value in given.items() if value is not None}
        found = self._api.ask("GET", "/v1/policy/explain", params=query)
        return {name: found[name] for name in ("refusal", "experts")}

    def simulate(self, file: PolicyFile, *, prune: bool) -> Json:
        return self._api.ask("POST", "/v1/policy/simulate", json={"policy": _content(file), "prune": prune})

    def _apply(self, file: PolicyFile, prune: bool, *, dry_run: bool) -> list[Json]:
        body = {"policy": _content(file), "prune": prune, "dry_run": dry_run}
        return list(self._api.ask("POST", "/v1/policy/apply", json=body)["changes"])


def _content(file: PolicyFile) -> Json:
    return file.model_dump(mode="json", exclude_unset=True)
