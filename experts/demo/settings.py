"""The numbers of the demo recipe in one place."""

from __future__ import annotations

from dataclasses import dataclass, field

from flexgate.experts.train import Schedule


@dataclass(frozen=True)
class Settings:
    """Sizes and budgets; the defaults make the shipped checkpoint."""

    seed: int = 20
    vocab_size: int = 1280
    hidden_size: int = 128
    intermediate_size: int = 256
    layers: int = 4
    expert_layers: tuple[int, ...] = (2, 3)
    heads: int = 4
    top_k: int = 2
    max_length: int = 1024
    registers: int = 1000
    channels: int = 48
    tokens_per_batch: int = 2500
    workers: int = 2
    anchor_documents: int = 60_000
    anchor: Schedule = field(default=Schedule(peak=3e-3, steps=1800))
    key_weight: float = 0.3
    prompt_weight: float = 0.05
    router_prompt_weight: float = 0.05
    router_documents: int = 800
    router_public_documents: int = 1_600
    router_decay: float = 1e-4
    sharpness: float = 3.0
    owner_tokens_per_batch: int = 1400
    owner_documents: int = 8_000
    owner_prompt_weight: float = 0.0
    owner: Schedule = field(default=Schedule(peak=3e-3, steps=450))
    owner_upper: Schedule = field(default=Schedule(peak=2e-3, steps=200))
