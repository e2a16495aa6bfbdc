"""Greedy decoding of many prompts at once, without a cache: slow per token, simple and exact.

Shapes: B prompts, T positions, E experts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Logits = Callable[[Tensor], Tensor]
"""Tokens ``[B, T]``, right-padded, to logits ``[B, T, V]``; causal, so padding cannot be seen."""


@torch.no_grad()
def greedy(
    logits_of: Logits, prompts: Sequence[Sequence[int]], *, eos_id: int, max_new: int, batch: int = 64
) -> list[list[int]]:
    """The continuation of every prompt up to and without ``eos_id``; ``max_new`` tokens if it never comes."""
    answers: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(order), batch):
        chunk = order[start : start + batch]
        for index, answer in zip(
            chunk, _greedy_chunk(logits_of, [prompts[i] for i in chunk], eos_id, max_new), strict=True
        ):
            answers[index] = answer
    return answers


def _greedy_chunk(logits_of: Logits, prompts: Sequence[Sequence[int]], eos_id: int, max_new: int) -> list[list[int]]:
    texts = [list(prompt) for prompt in prompts]
    open_rows = list(range(len(texts)))
    for _ in range(max_new):
        longest = max(len(texts[row]) for row in open_rows)
        tokens = torch.full((len(open_rows), longest), eos_id, dtype=torch.long)
        for position, row in enumerate(open_rows):
            tokens[position, : len(texts[row])] = torch.tensor(texts[row])
        last = torch.tensor([len(texts[row]) - 1 for row in open_rows])
        chosen = logits_of(tokens)[torch.arange(len(open_rows)), last].argmax(-1).tolist()
        for row, token in zip(open_rows, chosen, strict=True):
            texts[row].append(token)
        open_rows = [row for row in open_rows if texts[row][-1] != eos_id]
        if not open_rows:
            break
    return [_strip(text[len(prompt) :], eos_id) for text, prompt in zip(texts, prompts, strict=True)]


def _strip(tokens: list[int], eos_id: int) -> list[int]:
    return tokens[: tokens.index(eos_id)] if eos_id in tokens else tokens
