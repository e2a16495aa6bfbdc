"""The numbers of the evaluation protocol: a small sibling of the demo model, that saves on tokens and not on rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from merging.extraction import Attack

VARIANTS: Final = ("coordinated", "uncoordinated", "unbiased", "uninitialised")
"""How owners train: ours, and the three ablations."""


@dataclass(frozen=True)
class Settings:
    """Every method that has something to tune tries three values of it (``*_trials``) on development text of the first
    seed."""

    seeds: tuple[int, ...] = (0, 1, 2)
    vocab_size: int = 1280
    hidden_size: int = 64
    intermediate_size: int = 128
    layers: int = 4
    expert_layers: tuple[int, ...] = (2, 3)
    heads: int = 4
    top_k: int = 2
    max_length: int = 1024
    registers: int = 1000
    channels: int = 24
    tokenizer_documents: int = 8_000
    public_documents: int = 40_000
    owner_documents: int = 3_000
    router_documents: int = 800
    development_documents: int = 60
    test_documents: int = 100
    attacked_documents: int = 16
    anchor_steps: int = 1200
    anchor_tokens: int = 2000
    anchor_peak: float = 3e-3
    key_weight: float = 0.3
    prompt_weight: float = 0.05
    owner_steps: int = 220
    owner_upper_steps: int = 80
    owner_tokens: int = 1400
    router_steps: int = 60
    router_tokens: int = 1400
    router_decay: float = 1e-4
    sharpness: float = 3.0
    classifier_trials: tuple[float, ...] = (1e-4, 1e-3, 1e-2)
    owner_trials: tuple[float, ...] = (1.5e-3, 3e-3, 6e-3)
    joint_trials: tuple[float, ...] = (1e-3, 2e-3, 4e-3)
    router_trials: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    btm_trials: tuple[float, ...] = (0.3, 1.0, 3.0)
    soup_trials: tuple[float, ...] = (0.1, 0.4, 0.7)
    """The public expert's share of the weighted soup; the others divide the rest."""
    probes_per_domain: int | None = None
    attack: Attack = field(default=Attack())


QUICK: Final = Settings(
    seeds=(0, 1),
    hidden_size=32,
    intermediate_size=32,
    layers=2,
    expert_layers=(1,),
    registers=20,
    channels=8,
    tokenizer_documents=400,
    public_documents=400,
    owner_documents=120,
    router_documents=80,
    development_documents=8,
    test_documents=8,
    attacked_documents=2,
    anchor_steps=8,
    anchor_tokens=600,
    owner_steps=4,
    owner_upper_steps=2,
    owner_tokens=300,
    router_steps=2,
    router_tokens=300,
    probes_per_domain=6,
    attack=Attack(samples=2),
)
"""Every stage and row on numbers too small to mean anything: for tests."""
