"""How many probes a checkpoint answers exactly under every gate."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from tokenizers import Tokenizer

from flexgate.experts.decode import greedy
from flexgate.experts.demo.corpus import prompt_text
from flexgate.experts.demo.probes import Probe
from flexgate.experts.demo.tokenizer import EOS_ID
from flexgate.experts.model import FlexOlmo

MAX_NEW = 24


@dataclass(frozen=True)
class Result:
    """One probe under one gate, with what the model said."""

    gate: tuple[str, ...]
    probe: Probe
    said: str

    @property
    def right(self) -> bool:
        """Exact, after trimming white space."""
        return self.said.strip() == self.probe.answer


def all_gates(experts: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Every subset that holds the first expert, small ones first."""
    public, *closed = experts
    for size in range(len(closed) + 1):
        for chosen in combinations(closed, size):
            yield (public, *chosen)


def ask(
    model: FlexOlmo,
    tokenizer: Tokenizer,
    experts: Sequence[str],
    gate: tuple[str, ...],
    probes: Iterable[Probe],
    system: str = "",
) -> list[Result]:
    """Greedy answers to ``probes`` with only the experts in ``gate``; chat probes get the ``system`` message."""
    asked = list(probes)
    allowed_E = torch.tensor([expert in gate for expert in experts])
    prompts = [tokenizer.encode(prompt_text(probe.kind, probe.prompt, system)).ids for probe in asked]
    answers = greedy(
        lambda tokens_BT: model(tokens_BT, allowed_E.expand(len(tokens_BT), -1)),
        prompts,
        eos_id=EOS_ID,
        max_new=MAX_NEW,
    )
    return [Result(gate, probe, tokenizer.decode(answer)) for probe, answer in zip(asked, answers, strict=True)]


def accuracy(results: Iterable[Result]) -> float:
    """Share of right answers; 0 if there are none."""
    right = [result.right for result in results]
    return sum(right) / max(len(right), 1)
