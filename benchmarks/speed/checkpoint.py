"""The random checkpoint that every benchmark serves: large enough that a step is mostly arithmetic."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from enginekit.checkpoints import Shape, write_random

import flexgate.experts.demo

DEMO = Path(flexgate.experts.demo.__file__).with_name("checkpoint")
VOCABULARY = json.loads((DEMO / "config.json").read_text())["vocab_size"]
MIDDLE = Shape(hidden=512, intermediate=1024, layers=8, heads=8, kv_heads=8, experts=8, top_k=2, vocab=VOCABULARY)
TINY = replace(MIDDLE, hidden=64, intermediate=48, layers=2, heads=2, kv_heads=2, experts=4)


@contextmanager
def checkpoint(shape: Shape) -> Iterator[Path]:
    """A directory that `flexgate serve` and `vllm serve` take: weights, the demo's tokenizer and chat template."""
    with tempfile.TemporaryDirectory(prefix="flexgate-bench-") as parent:
        directory = write_random(Path(parent) / "bench", shape)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(DEMO / name, directory)
        yield directory


def described(shape: Shape) -> dict[str, Any]:
    """The shape as a result file names it."""
    return asdict(shape) | {"dtype": "bfloat16"}
