"""A small owner: texts, public texts and an anchor to train against; and torchrun, ended in time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil

from flexgate.experts.training.loop import Plan
from flexgate.experts.training.train_anchor import AnchorOptions, train_anchor
from flexgate.experts.training.train_expert import ExpertOptions

PLAN = Plan(steps=8, peak=5e-3, warmup=2, tokens_per_batch=300, save_every=3, evaluate_every=4)
SIZES = AnchorOptions(
    PLAN, vocab_size=270, hidden_size=16, intermediate_size=12, layers=2, heads=2, length=48, dtype="float32"
)
OPTIONS = ExpertOptions(PLAN, length=48)


def write_owner(root: Path) -> None:
    """``public/``, ``own/`` and ``anchor/``."""
    for name in ("public", "own"):
        (root / name).mkdir()
    (root / "public/texts.jsonl").write_text(
        "".join(
            json.dumps({"text": f"The {noun} number {i} is on the market."}) + "\n"
            for i in range(20)
            for noun in ("pear", "lamp")
        )
    )
    (root / "own/a.jsonl").write_text(
        "".join(json.dumps({"prompt": f"Zorp {i}?", "answer": f"Zorp {i} is quil."}) + "\n" for i in range(30))
    )
    (root / "own/b.txt").write_text("zorp quil zorp quil " * 12)
    train_anchor(root / "public", root / "anchor", SIZES)


def torchrun(*words: str | Path, processes: int = 2, seconds: float = 240) -> subprocess.CompletedProcess[str]:
    """Start ``words`` as a program in several processes, and wait; after ``seconds`` all of them are killed.

    torchrun makes a session of each process, so none is in a group with it.
    """
    bin_ = Path(sys.executable).parent
    command = [bin_ / "torchrun", "--standalone", "--no-python", f"--nproc-per-node={processes}", *words]
    environment = os.environ | {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", "PATH": f"{bin_}:{os.environ['PATH']}"}
    with subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        try:
            out, err = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            for member in family:
                with suppress(psutil.NoSuchProcess):
                    member.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)
