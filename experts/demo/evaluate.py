"""How many probes a checkpoint answers exactly under every gate."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from tokenizers import Tokenizer

from flexgate.experts.demo.corpus import answer_text, prompt_text
from flexgate.experts.demo.probes import Probe
from flexgate.experts.demo.tokenizer import EOS_ID
from flexgate.experts.training.decode import Logits, greedy, says
from flexgate.experts.training.model import FlexOlmo

MAX_NEW = 24
PUBLIC = "public"


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
    prompts = [tokenizer.encode(prompt_text(probe.kind, probe.prompt, system)).ids for probe in asked]
    answers = greedy(_gated(model, experts, gate), prompts, eos_id=EOS_ID, max_new=MAX_NEW)
    return [Result(gate, probe, tokenizer.decode(answer)) for probe, answer in zip(asked, answers, strict=True)]


def answered(
    model: FlexOlmo,
    tokenizer: Tokenizer,
    experts: Sequence[str],
    gate: tuple[str, ...],
    probes: Sequence[Probe],
    system: str = "",
) -> list[bool]:
    """Whether ``ask`` would find each probe right, in fewer steps.

    Greedy decoding says the answer's own tokens if and only if each is the likeliest after those before it, which one
    pass shows. The rest may say the answer in other tokens: they are decoded until they leave it.
    """
    logits_of = _gated(model, experts, gate)
    prompts = [tokenizer.encode(prompt_text(probe.kind, probe.prompt, system)).ids for probe in probes]
    answers = [tokenizer.encode(learnt_answer(probe)).ids for probe in probes]
    right = says(logits_of, prompts, [[*answer, EOS_ID] for answer in answers])
    rest = [number for number, is_right in enumerate(right) if not is_right]

    def still_right(position: int, tokens: Sequence[int]) -> bool:
        return probes[rest[position]].answer.startswith(tokenizer.decode(tokens).strip())

    said = greedy(logits_of, [prompts[number] for number in rest], eos_id=EOS_ID, max_new=MAX_NEW, go_on=still_right)
    for number, tokens in zip(rest, said, strict=True):
        right[number] = tokenizer.decode(tokens).strip() == probes[number].answer
    return right


def learnt_answer(probe: Probe) -> str:
    """The answer as a model has learnt to say it: owners' with a space before it in chats, too."""
    return answer_text(probe.kind if probe.domain == PUBLIC else "completion", probe.answer)


def _gated(model: FlexOlmo, experts: Sequence[str], gate: tuple[str, ...]) -> Logits:
    allowed_E = torch.tensor([expert in gate for expert in experts])
    return lambda tokens_BT: model(tokens_BT, allowed_E.expand(len(tokens_BT), -1))
