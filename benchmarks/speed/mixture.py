"""Tokens per second of an OLMoE-shaped engine, 64 experts and top-8 in a layer: gated, and with the gate left out.

Hidden and expert sizes are half of OLMoE-1B-7B's, with two layers and a small vocabulary, so that a step is mostly its
experts. Both have vLLM's own class for the model; the ungated engine is there twice (A/A).
"""

import tempfile
from pathlib import Path
from typing import Any

from enginekit.checkpoints import assign_units, write_mixture

from speed.engine_speed import AGAIN, Case, measure, report
from speed.engines import Batch
from speed.record import Run

CONTENDERS = {"gated": "gated", "ungated": "ungated", AGAIN: "ungated"}
STARTS, UNITS = 5, 8
SHAPE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 1024,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "num_experts": 64,
    "num_experts_per_tok": 8,
}
TINY = SHAPE | {"hidden_size": 64, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
CASES: tuple[Case, ...] = (
    ("prefill", Batch(1, 128, 1), 20),
    ("prefill", Batch(8, 32, 1), 14),
    ("decode", Batch(1, 4, 17), 30),
    ("decode", Batch(8, 4, 13), 16),
    ("decode", Batch(32, 4, 9), 12),
)


def run(mode: str, asked: Run) -> None:
    """Measure ``eager`` or ``compiled`` engines."""
    name, shape = f"mixture-{mode}", TINY if asked.quick else SHAPE
    cases = [(phase, batch, asked.rounds or (2 if asked.quick else usual)) for phase, batch, usual in CASES]
    starts, journal = asked.starts or (1 if asked.quick else STARTS), asked.journal(name)
    with tempfile.TemporaryDirectory(prefix="flexgate-bench-") as folder:
        model = write_mixture(Path(folder) / "bench", "olmoe", **shape)
        names = ["public", *(f"unit-{number}" for number in range(1, UNITS))]
        assign_units(model, names, [[expert % UNITS for expert in range(64)]] * shape["num_hidden_layers"])
        for start in range(starts):
            measure(model, start, cases, journal, eager=mode == "eager", contenders=CONTENDERS)
    measured, itself = report(journal, starts, cases, CONTENDERS)
    asked.write(name, measured, shape=shape | {"model_type": "olmoe", "dtype": "bfloat16"}, itself=itself)
    journal.close()
