"""Greedy decoding of many prompts at once, without a cache: slow per token, simple and exact.

Shapes: B prompts, T positions, E experts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Logits = Callable[[Tensor], Tensor]
"""Tokens ``[B, T]``, right-padded, to logits ``[B, T, V]``; causal, so padding cannot be seen."""


GoOn = Callable[[int, Sequence[int]], bool]
"""Whether a prompt, by its place in the list, is worth continuing after the tokens said so far."""


@torch.no_grad()
def greedy(
    logits_of: Logits,
    prompts: Sequence[Sequence[int]],
    *,
    eos_id: int,
    max_new: int,
    batch: int = 64,
    go_on: GoOn = lambda _place, _said: True,
) -> list[list[int]]:
    """The continuation of every prompt up to and without ``eos_id``; ``max_new`` tokens if it never comes."""
    texts = [list(prompt) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(order), batch):
        open_rows = order[start : start + batch]
        for _ in range(max_new):
            _say_one(logits_of, texts, open_rows, eos_id)
            open_rows = [
                row for row in open_rows if texts[row][-1] != eos_id and go_on(row, texts[row][len(prompts[row]) :])
            ]
            if not open_rows:
                break
    return [_strip(text[len(prompt) :], eos_id) for text, prompt in zip(texts, prompts, strict=True)]


@torch.no_grad()
def says(
    logits_of: Logits, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], *, batch: int = 64
) -> list[bool]:
    """Whether greedy decoding would continue each prompt with exactly these tokens."""
    right = [False] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]) + len(answers[index]))
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        likeliest = logits_of(_pad([[*prompts[row], *answers[row]] for row in rows], 0)).argmax(-1)
        for position, row in enumerate(rows):
            first = len(prompts[row]) - 1
            said = likeliest[position, first : first + len(answers[row])].tolist()
            right[row] = said == list(answers[row])
    return right


def _say_one(logits_of: Logits, texts: list[list[int]], rows: Sequence[int], eos_id: int) -> None:
    """Append the likeliest next token to each of ``rows``."""
    last = torch.tensor([len(texts[row]) - 1 for row in rows])
    logits_BTV = logits_of(_pad([texts[row] for row in rows], eos_id))
    for row, token in zip(rows, logits_BTV[torch.arange(len(rows)), last].argmax(-1).tolist(), strict=True):
        texts[row].append(token)


def _pad(rows: Sequence[Sequence[int]], token: int) -> Tensor:
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[token] * (longest - len(row))] for row in rows])


def _strip(tokens: list[int], eos_id: int) -> list[int]:
    return tokens[: tokens.index(eos_id)] if eos_id in tokens else tokens
