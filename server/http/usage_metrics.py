"""Prometheus counters of what the ledger has recorded, by expert and by project, and of denials by expert and reason.

A request is counted when its end is committed, in the ledger's thread: a counter never says more than the ledger, and
no request waits for it. All begin at 0 with the process. Names are bounded in number, and an expert that the catalogue
hides when the counters are read has none: readers of a dashboard may not be allowed to read the catalogue.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Final, TypeVar

from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from flexgate.kernels.gated_topk import MASS_SCALE
from flexgate.policies.documents import Expert
from flexgate.policies.ids import ExpertId
from flexgate.server.ledger.entries import Part, Registration, Used
from flexgate.server.ledger.shares import PPM

MOST_NAMES: Final = 250
"""Experts, projects, and kinds of denials with series of their own; those that come later count under `OTHER`."""
OTHER: Final = "_other"
HIDDEN: Final = "_hidden"
"""Like `OTHER`, no name that an expert or a project can have."""
_EXPERT: Final = ("expert", "owner")
_Catalogue = Callable[[], Mapping[ExpertId, Expert]]
K = TypeVar("K")


@dataclass(slots=True)
class _Tokens:
    """Of a project."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0


@dataclass(slots=True)
class _Work:
    """Of an expert: requests, positions, millionths of tokens, and routing weight in 1/2³²."""

    requests: int = 0
    prompt: int = 0
    completion: int = 0
    share_ppm: int = 0
    mass: int = 0

    def add(self, other: _Work) -> None:
        """Count what another one has, too."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


class UsageMetrics(Collector):
    """The counters. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._catalogue: _Catalogue = dict
        self._experts: dict[tuple[str, str], _Work] = {}
        self._projects: dict[str, _Tokens] = {}
        self._outcomes: Counter[tuple[str, str]] = Counter()
        self._denials: Counter[tuple[str, str, str]] = Counter()

    def name_by(self, catalogue: _Catalogue) -> None:
        """Take the names of experts from a catalogue, which may be asked from any thread."""
        self._catalogue = catalogue

    def count(self, registration: Registration, outcome: str, used: Used, parts: Sequence[Part]) -> None:
        """Count a request that is recorded, which may be before there is a catalogue."""
        tokens = used.prompt_tokens + used.completion_tokens
        with self._lock:
            project = _bounded(registration.tenant, self._projects, OTHER)
            self._outcomes[project, outcome] += 1
            of_project = self._projects.get(project) or self._projects.setdefault(project, _Tokens())
            of_project.prompt += used.prompt_tokens
            of_project.cached += used.cached_tokens
            of_project.completion += used.completion_tokens
            for part in parts:
                name = _bounded((part.expert, part.owner or ""), self._experts, (OTHER, OTHER))
                of_expert = self._experts.get(name) or self._experts.setdefault(name, _Work())
                of_expert.requests += 1
                of_expert.prompt += part.prompt_positions
                of_expert.completion += part.completion_positions
                of_expert.share_ppm += part.share_ppm * tokens
                of_expert.mass += part.prompt_mass + part.completion_mass

    def count_denial(self, rules: Iterable[tuple[str, str, str]]) -> None:
        """Count a denied request by its reasons: the expert, the code and the rule of each."""
        catalogue = self._catalogue()
        with self._lock:
            for expert, code, _ in rules:
                document = catalogue.get(ExpertId(expert))
                named = (HIDDEN, HIDDEN) if document is None else (expert, document.owner or "")
                self._denials[_bounded((*named, code), self._denials, (OTHER, OTHER, OTHER))] += 1

    def collect(self) -> Iterator[CounterMetricFamily]:
        """What was counted so far, by names of now; every family, also those without a series."""
        catalogue, experts, denials = self._catalogue(), dict[tuple[str, str], _Work](), Counter[tuple[str, ...]]()
        with self._lock:
            for name, of in self._experts.items():
                experts.setdefault(_shown(catalogue, *name), _Work()).add(of)
            for (expert, owner, code), number in self._denials.items():
                denials[*_shown(catalogue, expert, owner), code] += number
            projects = [(name, replace(of)) for name, of in self._projects.items()]
            outcomes = list(self._outcomes.items())
        yield _family(
            "flexgate_expert_requests",
            "Recorded requests in which an expert took part.",
            _EXPERT,
            [(name, of.requests) for name, of in experts.items()],
        )
        yield _family(
            "flexgate_expert_tokens",
            "Positions in which an expert took part.",
            (*_EXPERT, "kind"),
            [
                ((*name, kind), value)
                for name, of in experts.items()
                for kind, value in (("prompt", of.prompt), ("completion", of.completion))
            ],
        )
        yield _family(
            "flexgate_expert_share_weighted_tokens",
            "Tokens of requests times an expert's share of their routing weight.",
            _EXPERT,
            [(name, of.share_ppm / PPM) for name, of in experts.items()],
        )
        yield _family(
            "flexgate_expert_routing_weight",
            "Routing weight of an expert, summed over layers and positions.",
            _EXPERT,
            [(name, of.mass / MASS_SCALE) for name, of in experts.items()],
        )
        yield _family(
            "flexgate_project_requests",
            "Recorded requests by how they ended.",
            ("project", "outcome"),
            outcomes,
        )
        yield _family(
            "flexgate_project_tokens",
            "Tokens of recorded requests; cached ones are prompt tokens, too.",
            ("project", "kind"),
            [((name, kind), value) for name, of in projects for kind, value in asdict(of).items()],
        )
        yield _family(
            "flexgate_denials",
            "Reasons why requests were denied an expert that they named.",
            (*_EXPERT, "code"),
            denials.items(),
        )


def _bounded(name: K, known: Mapping[K, object], other: K) -> K:
    """A name that has series, or may still get them; else `other`."""
    return name if name in known or len(known) < MOST_NAMES else other


def _shown(catalogue: Mapping[ExpertId, Expert], expert: str, owner: str) -> tuple[str, str]:
    """An expert with its owner, unless the catalogue hides it or does not have it."""
    if expert == OTHER:
        return OTHER, OTHER
    document = catalogue.get(ExpertId(expert))
    return (HIDDEN, HIDDEN) if document is None or document.visibility == "hidden" else (expert, owner)


def _family(
    name: str, about: str, labels: Sequence[str], values: Iterable[tuple[Sequence[str], float]]
) -> CounterMetricFamily:
    family = CounterMetricFamily(name, about, labels=labels)
    for names, value in values:
        family.add_metric(names, value)
    return family


USAGE: Final = UsageMetrics()
REGISTRY.register(USAGE)
