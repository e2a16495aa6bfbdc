"""Compiled agreements: made when an agreement changes, read by every decision."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Self

from flexgate.policies.agreements import Agreement
from flexgate.policies.ids import PUBLIC, ExpertId
from flexgate.policies.vocabulary import prohibited_regions, purpose_and_above, region_and_above


@dataclass(frozen=True, slots=True)
class Clause:
    """An agreement as the decision reads it. `*_above` hold its words and all that cover them;
    `whatever` says that it permits for any purpose, anywhere.
    """

    agreement_id: str
    version: int
    permits: bool
    purposes: frozenset[str] | None
    purposes_above: frozenset[str]
    regions: frozenset[str] | None
    regions_above: frozenset[str]
    starts: float
    ends: float
    whatever: bool

    @property
    def unlimited(self) -> bool:
        """Whether it permits at any time, for any purpose, anywhere."""
        return self.whatever and self.starts == -math.inf and self.ends == math.inf

    @property
    def rule(self) -> str:
        return f"agreement/{self.agreement_id}@{self.version}"


def by_start(clause: Clause) -> tuple[float, str]:
    """The order in which clauses are kept."""
    return clause.starts, clause.agreement_id


Row = Mapping[ExpertId, tuple[Clause, ...]]
ANCHOR: Final = frozenset({PUBLIC})


@dataclass(frozen=True, slots=True)
class Terms:
    """All clauses between one assignee and each expert, by start.

    `always` are the anchor and the experts of `unlimited`, which permits whatever a request
    declares; `limited` are all other clauses, and `dates` the moments at which one of these starts
    or ends, in order.
    """

    always: frozenset[ExpertId]
    unlimited: Row
    limited: Row
    dates: tuple[float, ...]

    @classmethod
    def of(cls, clauses: Iterable[tuple[ExpertId, Clause]]) -> Self:
        """Compile clauses, in whatever order."""
        unlimited: dict[ExpertId, list[Clause]] = {}
        limited: dict[ExpertId, list[Clause]] = {}
        edges: set[float] = set()
        for expert, clause in sorted(clauses, key=lambda pair: by_start(pair[1])):
            row = unlimited if clause.unlimited else limited
            row.setdefault(expert, []).append(clause)
            edges |= {clause.starts, clause.ends}
        dates = tuple(sorted(edges - {-math.inf, math.inf}))
        return cls(ANCHOR.union(unlimited), _row(unlimited), _row(limited), dates)

    def clauses(self) -> Iterable[tuple[ExpertId, Clause]]:
        """What it was compiled from."""
        for row in (self.unlimited, self.limited):
            for expert, clauses in row.items():
                for clause in clauses:
                    yield expert, clause


def _row(clauses: dict[ExpertId, list[Clause]]) -> Row:
    return {expert: tuple(found) for expert, found in clauses.items()}


def compile_clause(agreement: Agreement) -> Clause:
    """An agreement as the decision reads it."""
    purposes = None if agreement.purposes and "all" in agreement.purposes else agreement.purposes
    permits, regions = agreement.effect == "permit", agreement.regions
    if regions is not None and not permits:
        regions = prohibited_regions(regions)
    return Clause(
        agreement_id=agreement.id,
        version=agreement.version,
        permits=permits,
        purposes=purposes,
        purposes_above=frozenset().union(*(purpose_and_above(p) for p in purposes or ())),
        regions=regions,
        regions_above=frozenset().union(*(region_and_above(r) for r in regions or ())),
        starts=agreement.starts,
        ends=agreement.ends,
        whatever=permits and purposes is None and regions is None,
    )
