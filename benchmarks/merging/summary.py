"""From the figures of every seed to means, intervals, paired differences, and whether the aims are met."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, Final

from merging.methods import MERGING, OURS, UNRESTRICTED
from merging.statistics import difference, summary

Seeds = Sequence[Mapping[str, Any]]
MACRO: Final = "macro"


def summarise(seeds: Seeds) -> dict[str, Any]:
    """Everything that the report prints, from what ``protocol`` kept."""
    rows = seeds[0]["rows"]
    return {
        "rows": {name: _row(seeds, name) for name in rows},
        "ours_less": {name: difference(_macro(seeds, OURS), _macro(seeds, name)) for name in rows if name != OURS},
        "routing": _routing(seeds),
        "placing": {
            method: {domain: summary([seed["placing"][method][domain] for seed in seeds]) for domain in shares}
            for method, shares in seeds[0]["placing"].items()
        },
        "extraction": _extraction(seeds),
        "aims": aims(seeds),
    }


def aims(seeds: Seeds) -> dict[str, Any]:
    """The figures that the aims are judged by; differences of accuracy are in points of 1."""
    ours = _macro(seeds, OURS)
    best = max(MERGING, key=lambda name: fmean(_macro(seeds, name)))
    gap = difference(ours, _macro(seeds, UNRESTRICTED))
    owners = list(seeds[0]["extraction"])
    moved = [_moved(seed, owner) for seed in seeds for owner in owners]
    own = [_returned(seed, owner) for seed in seeds for owner in owners]
    attacks = [seed["extraction"][owner] for seed in seeds for owner in owners]
    leaks = [abs(attack["excluded"] - attack["never had"]) for attack in attacks]
    return {
        "best merging baseline": {"name": best, "ours_less": difference(ours, _macro(seeds, best))},
        "beats every merging baseline": all(fmean(ours) > fmean(_macro(seeds, name)) for name in MERGING),
        "unrestricted": {"ours_less": gap, "within 2 %": gap["mean"] >= -0.02 * fmean(_macro(seeds, UNRESTRICTED))},
        "other domains, accuracy": _judged([abs(move["accuracy"]) for move in moved], 0.01),
        "other domains, perplexity": _judged([abs(move["perplexity"]) for move in moved], 0.01),
        "own domain as if never merged, nats": _judged(own, 1e-4),
        "extraction, excluded less never had": _judged(leaks, 0.0),
    }


def _judged(values: Sequence[float], bound: float) -> dict[str, Any]:
    return {"greatest": max(values), "mean": fmean(values), "bound": bound, "met": max(values) <= bound}


def _moved(seed: Mapping[str, Any], owner: str) -> dict[str, float]:
    """The greatest change of another domain when ``owner`` is excluded: of accuracy, and relative of perplexity."""
    with_all, without = seed["rows"][OURS], seed["rows"][f"without {owner}"]
    others = [name for name in with_all["accuracy"] if name != owner]
    accuracy = (without["accuracy"][name] - with_all["accuracy"][name] for name in others)
    perplexity = (math.exp(without["nats"][name] - with_all["nats"][name]) - 1 for name in others)
    return {"accuracy": max(accuracy, key=abs), "perplexity": max(perplexity, key=abs)}


def _returned(seed: Mapping[str, Any], owner: str) -> float:
    """How far the excluded model's loss is from that of a merge without the expert, on the domain where most."""
    excluded, never = seed["rows"][f"without {owner}"]["nats"], seed["rows"][f"never had {owner}"]["nats"]
    return max(abs(excluded[name] - never[name]) for name in excluded)


def _row(seeds: Seeds, name: str) -> dict[str, Any]:
    rows = [seed["rows"][name] for seed in seeds]
    domains = rows[0]["accuracy"]
    return {
        kind: {
            **{domain: summary([row[kind][domain] for row in rows]) for domain in domains},
            MACRO: summary([fmean(row[kind].values()) for row in rows]),
        }
        for kind in ("accuracy", "nats")
    }


def _macro(seeds: Seeds, name: str) -> list[float]:
    return [fmean(seed["rows"][name]["accuracy"].values()) for seed in seeds]


def _routing(seeds: Seeds) -> dict[str, Any]:
    def layers(variant: str, domain: str) -> list[Any]:
        return [summary(layer) for layer in zip(*(seed["routing"][variant][domain] for seed in seeds), strict=True)]

    return {
        variant: {domain: layers(variant, domain) for domain in domains}
        for variant, domains in seeds[0]["routing"].items()
    }


def _extraction(seeds: Seeds) -> dict[str, Any]:
    first = seeds[0]["extraction"]

    def mean(found: Mapping[str, Any], kind: str) -> float:
        return fmean(row[kind] for row in found.values())

    kinds = next(iter(first.values()))
    return {
        **{
            owner: {kind: summary([seed["extraction"][owner][kind] for seed in seeds]) for kind in kinds}
            for owner in first
        },
        MACRO: {kind: summary([mean(seed["extraction"], kind) for seed in seeds]) for kind in kinds},
    }
