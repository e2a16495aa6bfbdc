"""What a request declares, a purpose and a region, beside what agreements are about."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from flexgate.policies.compiled.agreements import CompiledAgreement
from flexgate.policies.vocabulary import Purpose, Region, purpose_and_above, region_and_above


@dataclass(frozen=True, slots=True)
class Context:
    """A declared purpose and region, with the words that cover them."""

    purpose: Purpose | None
    region: Region | None
    purposes: frozenset[str]
    regions: frozenset[str]

    @classmethod
    def of(cls, purpose: Purpose | None, region: Region | None) -> Context:
        return cls(
            purpose,
            region,
            frozenset() if purpose is None else purpose_and_above(purpose),
            frozenset() if region is None else region_and_above(region),
        )

    def covered_by(self, agreement: CompiledAgreement) -> bool:
        """Whether the agreement is about all of the declared purpose and region."""
        return (agreement.purposes is None or not agreement.purposes.isdisjoint(self.purposes)) and (
            agreement.regions is None or not agreement.regions.isdisjoint(self.regions)
        )

    def touched_by(self, agreement: CompiledAgreement) -> bool:
        """Whether the agreement is about any part of the declared purpose and region."""
        return (
            agreement.purposes is None
            or self.purpose is None
            or not agreement.purposes.isdisjoint(self.purposes)
            or self.purpose in agreement.purposes_above
        ) and (
            agreement.regions is None
            or self.region is None
            or not agreement.regions.isdisjoint(self.regions)
            or self.region in agreement.regions_above
        )


ANYTHING: Final = Context.of(None, None)
