"""The numbers of the demo recipe in one place."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from flexgate.experts.training.loop import Plan
from flexgate.experts.training.train_anchor import AnchorOptions, Channels

SEED: Final = 20


def plan(steps: int, peak: float, tokens_per_batch: int) -> Plan:
    """A training to its last step: nobody stops early, and only answers count."""
    return Plan(
        steps=steps,
        peak=peak,
        warmup=50,
        tokens_per_batch=tokens_per_batch,
        prompt_weight=0.0,
        seed=SEED,
        save_every=steps,
        evaluate_every=steps,
        patience=0,
    )


@dataclass(frozen=True)
class Settings:
    """Sizes and budgets; the defaults make the shipped checkpoint."""

    seed: int = SEED
    anchor: AnchorOptions = field(
        default=AnchorOptions(
            plan(2200, 3e-3, 1250),
            vocab_size=3328,
            hidden_size=128,
            intermediate_size=256,
            layers=4,
            heads=4,
            length=1024,
            channels=Channels(count=64, first_expert_layer=2, key_weight=0.3),
        )
    )
    workers: int = 2
    """Processes that train the anchor, each on ``anchor.plan.tokens_per_batch`` tokens a step."""
    registers: int = 1000
    tokenizer_documents: int = 20_000
    dictionary_weight: int = 100
    """How often the tokenizer reads the public dictionary."""
    anchor_documents: int = 100_000
    """Of every worker."""
    expert_layers: tuple[int, ...] = (2, 3)
    top_k: int = 2
    owner_documents: int = 8_000
    held_documents: int = 200
    owner: Plan = field(default=plan(400, 3e-3, 1400))
    owner_upper: Plan = field(default=plan(150, 2e-3, 1400))
    router_documents: int = 1_600
    router_public_documents: int = 4_000
    router_tokens_per_batch: int = 2500
    router_prompt_weight: float = 0.05
    router_decay: float = 1e-4
    sharpness: float = 3.0
