"""Agreements as decisions read them: compiled once for each snapshot."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from flexgate.policies.terms import Agreement, ExpertId
from flexgate.policies.words import purpose_and_above, region_and_above


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


ClauseTable = Mapping[str, Mapping[ExpertId, tuple[Clause, ...]]]


def compile_clause(agreement: Agreement) -> Clause:
    """An agreement as the decision reads it."""
    purposes = None if agreement.purposes and "all" in agreement.purposes else agreement.purposes
    return Clause(
        agreement_id=agreement.id,
        version=agreement.version,
        permits=agreement.effect == "permit",
        purposes=purposes,
        purposes_above=frozenset().union(*(purpose_and_above(p) for p in purposes or ())),
        regions=agreement.regions,
        regions_above=frozenset().union(*(region_and_above(r) for r in agreement.regions or ())),
        starts=agreement.starts,
        ends=agreement.ends,
        whatever=agreement.effect == "permit" and purposes is None and agreement.regions is None,
    )
