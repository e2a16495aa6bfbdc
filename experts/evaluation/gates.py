"""The rows of the opt-out matrix: which experts take part."""

from __future__ import annotations

from collections.abc import Sequence


def opt_out_gates(experts: Sequence[str]) -> dict[str, tuple[bool, ...]]:
    """All experts, all but each, each beside the public one alone, and the public one alone; index 0 is public."""
    closed = experts[1:]
    return {
        "all experts": _gate(experts, experts),
        **{f"without {name}": _gate(experts, [other for other in experts if other != name]) for name in closed},
        **{f"only {name}": _gate(experts, [experts[0], name]) for name in closed},
        "public only": _gate(experts, experts[:1]),
    }


def _gate(experts: Sequence[str], chosen: Sequence[str]) -> tuple[bool, ...]:
    return tuple(expert in chosen for expert in experts)
