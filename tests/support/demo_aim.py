"""What the shipped demo model is held to: the share of a domain's probes that a gate with its expert answers, and one
without it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable

AIM = 0.9
CLOSED = 0.05


def shares(results: Iterable[tuple[str, bool]]) -> dict[str, float]:
    """The share of right answers by domain."""
    asked, right = Counter[str](), Counter[str]()
    for domain, is_right in results:
        asked[domain] += 1
        right[domain] += is_right
    return {domain: right[domain] / asked[domain] for domain in asked}


def assert_answered_by_licence(found: dict[str, float], allowed: Collection[str]) -> None:
    """At least the aim with the licence, next to nothing without."""
    for domain, share in found.items():
        assert share >= AIM if domain in allowed else share <= CLOSED, found
