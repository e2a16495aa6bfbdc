"""Compiled agreements: built when an agreement changes, read by every decision."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Self

from flexgate.policies.agreements import Agreement, Duty, duties_sha256
from flexgate.policies.ids import PUBLIC, ExpertId, OwnerId
from flexgate.policies.vocabulary import purpose_and_above, region_and_above, restricted_regions

Precedence = tuple[int, bool, bool, float, str]
_ASSIGNEES: Final = ("tenant", "group", "everyone")


@dataclass(frozen=True, slots=True)
class CompiledAgreement:
    """An agreement as the decision reads it. `*_above` hold its words and all that cover them;
    `requires` says that it only names what must take part,
    `whatever` says that it permits for any purpose, anywhere, and `credit` is the line that responses must have.
    Of several that permit the same use, it counts under the
    one of least `precedence`.
    """

    agreement_id: str
    version: int
    permits: bool
    requires: bool
    purposes: frozenset[str] | None
    purposes_above: frozenset[str]
    regions: frozenset[str] | None
    regions_above: frozenset[str]
    starts: float
    ends: float
    owner: OwnerId
    duties: tuple[Duty, ...]
    duties_sha256: str
    credit: str | None
    whatever: bool
    precedence: Precedence

    @property
    def unlimited(self) -> bool:
        """Whether it permits at any time, for any purpose, anywhere."""
        return self.whatever and self.starts == -math.inf and self.ends == math.inf

    @property
    def rule(self) -> str:
        return f"agreement/{self.agreement_id}@{self.version}"


def by_start(agreement: CompiledAgreement) -> tuple[float, str]:
    """The order in which compiled agreements are kept."""
    return agreement.starts, agreement.agreement_id


def precedence_of(agreement: CompiledAgreement) -> Precedence:
    """The order in which agreements that permit the same use are chosen from, by the most special."""
    return agreement.precedence


ByStart = tuple[CompiledAgreement, ...]
"""In the order of `by_start`."""
Row = Mapping[ExpertId, ByStart]
ANCHOR: Final = frozenset({PUBLIC})


@dataclass(frozen=True, slots=True)
class AssigneeAgreements:
    """All compiled agreements between one assignee and each expert, by start.

    `always` are the anchor and the experts of `unlimited`, which permits whatever a request
    declares, and `preferred` the one of each that uses count under; `required` are those that require it, `limited` all
    others, and `dates` the moments at which one of these starts or ends, in order.
    """

    always: frozenset[ExpertId]
    preferred: Mapping[ExpertId, CompiledAgreement]
    unlimited: Row
    limited: Row
    required: Row
    dates: tuple[float, ...]

    @classmethod
    def of(cls, compiled: Iterable[tuple[ExpertId, CompiledAgreement]]) -> Self:
        """Sort compiled agreements, given in any order."""
        unlimited: dict[ExpertId, list[CompiledAgreement]] = {}
        limited: dict[ExpertId, list[CompiledAgreement]] = {}
        required: dict[ExpertId, list[CompiledAgreement]] = {}
        edges: set[float] = set()
        for expert, agreement in sorted(compiled, key=lambda pair: by_start(pair[1])):
            row = required if agreement.requires else unlimited if agreement.unlimited else limited
            row.setdefault(expert, []).append(agreement)
            edges |= {agreement.starts, agreement.ends}
        dates = tuple(sorted(edges - {-math.inf, math.inf}))
        preferred = {expert: min(row, key=precedence_of) for expert, row in unlimited.items()}
        return cls(ANCHOR.union(unlimited), preferred, _row(unlimited), _row(limited), _row(required), dates)

    def entries(self) -> Iterable[tuple[ExpertId, CompiledAgreement]]:
        """What it was compiled from."""
        for row in (self.unlimited, self.limited, self.required):
            for expert, compiled in row.items():
                for agreement in compiled:
                    yield expert, agreement


def _row(compiled: dict[ExpertId, list[CompiledAgreement]]) -> Row:
    return {expert: tuple(found) for expert, found in compiled.items()}


def compile_agreement(agreement: Agreement) -> CompiledAgreement:
    """An agreement as the decision reads it."""
    purposes = None if agreement.purposes and "all" in agreement.purposes else agreement.purposes
    permits, regions = agreement.effect == "permit", agreement.regions
    if regions is not None and not permits:
        regions = restricted_regions(regions)
    return CompiledAgreement(
        agreement_id=agreement.id,
        version=agreement.version,
        permits=permits,
        requires=agreement.effect == "require",
        purposes=purposes,
        purposes_above=frozenset().union(*(purpose_and_above(p) for p in purposes or ())),
        regions=regions,
        regions_above=frozenset().union(*(region_and_above(r) for r in regions or ())),
        starts=agreement.starts,
        ends=agreement.ends,
        owner=agreement.owner,
        duties=agreement.duties,
        duties_sha256=duties_sha256(agreement.duties),
        credit=next((duty.credit or agreement.owner for duty in agreement.duties if duty.kind == "attribute"), None),
        whatever=permits and purposes is None and regions is None,
        precedence=_precedence(agreement, purposes is None, regions is None),
    )


def _precedence(agreement: Agreement, any_purpose: bool, anywhere: bool) -> Precedence:
    """The project's own before its groups' before everyone's; then those limited in purpose, then in region; then the
    one that starts later, and at last the lower id.
    """
    assignee = _ASSIGNEES.index(agreement.assignee.partition(":")[0])
    return assignee, any_purpose, anywhere, -agreement.starts, agreement.id
