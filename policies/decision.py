"""Decisions: the allowed experts, one reason per excluded one, and until when it holds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from flexgate.policies.compiled.agreements import CompiledAgreement
from flexgate.policies.documents import Grade
from flexgate.policies.ids import ExpertId, TenantId
from flexgate.policies.vocabulary import Purpose, Region


class AllowedExperts(tuple[ExpertId, ...]):
    """Experts that passed the policy, in catalogue order. Only the decision code creates one.

    Slicing or adding gives a plain tuple, which does not fit where this type is asked for.
    """

    __slots__ = ()

    def __new__(cls, *_: object) -> AllowedExperts:
        raise TypeError("AllowedExperts comes out of flexgate.policies.decide only")


def allow(experts: Iterable[ExpertId]) -> AllowedExperts:
    """Create an `AllowedExperts`; for `flexgate.policies.decide` only."""
    return tuple.__new__(AllowedExperts, experts)


class Reason(NamedTuple):
    """Why one expert is excluded. `message` names the rule and what to do, `grade` what excluding it excludes."""

    expert: ExpertId
    grade: Grade
    code: str
    rule: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DecisionRequest:
    """What one request declares and filters. Its filter, `only` and `ignore`, names experts or sets, unchecked.

    `decision_id` is made by the caller (it must be unique; the decision does not use it).
    `only` of None means no filter (the tenant's default expert set applies), `()` means just `public`.
    """

    decision_id: str
    purpose: str | None = None
    region: str | None = None
    only: tuple[str, ...] | None = None
    ignore: tuple[str, ...] = ()

    @property
    def filters(self) -> bool:
        """Whether it names experts."""
        return self.only is not None or bool(self.ignore)


class Decision(NamedTuple):
    """The outcome for one request. `valid_until` is Unix seconds, or `math.inf`.

    At `valid_until` the first allowed expert stops being allowed, or one outside the gate begins to be required.
    `excluded` has one reason for each listed expert outside the gate, in catalogue order; hidden experts are not in it.
    `agreements` has for each of `allowed` the agreement that its use counts under, None where it needs none. `required`
    are those of `allowed` that no request of its kind may leave out.
    (A NamedTuple, because one is made per request, and a frozen dataclass costs three times that.)
    """

    decision_id: str
    tenant_id: TenantId
    policy_version: int
    allowed: AllowedExperts
    agreements: tuple[CompiledAgreement | None, ...]
    excluded: tuple[Reason, ...]
    required: frozenset[ExpertId]
    valid_until: float
    purpose: Purpose | None
    region: Region | None
