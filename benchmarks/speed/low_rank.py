"""Taking in and loading an expert of rank 64 against a full one of FlexOlmo-7B's layer shape, on the same disk.

What is timed is what grows with an expert: the private copy and its checks, the rank's check, the copy into the slot
and its digest. Waiting for the engine (canary, commit) is the same for both and is left out.
"""

import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from packagekit import make_package, write_model
from tqdm import tqdm

from flexgate.experts.checkpoint.base import BaseIdentity, base_identity
from flexgate.experts.checkpoint.layout import Architecture
from flexgate.experts.package.size import FULL, ExpertSize
from flexgate.experts.package.verify import open_package
from flexgate.server.engine.worker.slot_arrays import SlotArrays, low_rank_experts
from flexgate.server.engine.worker.slot_writer import SlotWriter
from speed.compare import spread, take_turns
from speed.record import Run
from speed.statistics import paired

STARTS = 5
AGAIN = "full again"
SLOT = {"full": 1, "low": 2, AGAIN: 1}
_CONTEXT = multiprocessing.get_context("spawn")


def run(asked: Run) -> None:
    """Both take turns in each of several processes."""
    journal = asked.journal("low-rank")
    hidden, intermediate, rank = (256, 688, 8) if asked.quick else (4096, 11008, 64)
    architecture = Architecture(64, hidden, intermediate, 2, 4, 4, num_experts=1, num_experts_per_tok=1)
    with tempfile.TemporaryDirectory(prefix="flexgate-bench-") as directory:
        root = Path(directory)
        write_model(root / "anchor", architecture, dtype="bfloat16")
        for name, size in (("full", FULL), ("low", ExpertSize(rank=rank))):
            make_package(root / name, root / "anchor", expert=name, size=size)
        starts, rounds = asked.starts or (2 if asked.quick else STARTS), asked.rounds or (2 if asked.quick else 5)
        for start in tqdm(range(starts), desc="processes"):
            if str(start) not in journal:
                with _CONTEXT.Pool(1) as process:
                    journal.add(str(start), process.apply(one_start, (str(root), rank, rounds)))
        sizes = {name: (root / name / "expert.safetensors").stat().st_size for name in ("full", "low")}
    turns = {who: [journal[str(start)][who] for start in range(starts)] for who in SLOT}
    ratio, again = paired(turns["low"], turns["full"]), paired(turns[AGAIN], turns["full"])
    results = {
        "what": f"seconds to take in, check and load an expert of rank {rank}, divided by those of a full one",
        "ratio": ratio.report(),
        "full again/full": again.report(),
        "seconds": {who: spread([value for start in turns[who] for value in start]) for who in ("full", "low")},
        "package_bytes": sizes,
    }
    shape = {name: getattr(architecture, name) for name in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    asked.write("low-rank", results, shape={**shape, "rank": rank}, itself=[("load", again)], allowed=0.1)
    journal.close()


def one_start(directory: str, rank: int, rounds: int) -> dict[str, list[float]]:
    """Turns of a new process: seconds of each expert."""
    root = Path(directory)
    base = base_identity(root / "anchor")
    writer = SlotWriter([_layer(base, rank) for _ in range(base.architecture.num_hidden_layers)])
    timed = {who: _timed(root, who.removesuffix(" again"), slot, base, writer) for who, slot in SLOT.items()}
    for call in timed.values():
        call()  # memory that was never written is slower
    return take_turns(timed, rounds)


def _layer(base: BaseIdentity, rank: int) -> SlotArrays:
    """A public expert, a full slot and one of the rank."""
    hidden, intermediate = base.architecture.hidden_size, base.architecture.intermediate_size
    w13 = torch.zeros(2, 2 * intermediate, hidden, dtype=torch.bfloat16)
    w2 = torch.zeros(2, hidden, intermediate, dtype=torch.bfloat16)
    (group,) = low_rank_experts((rank,), w2)
    factors = list(zip(*group.tensors, strict=True))
    return SlotArrays(
        bytes(range(3)), torch.zeros(16, hidden), torch.zeros(3), w13, w2, local=lambda expert: expert, factors=factors
    )


def _timed(root: Path, name: str, slot: int, base: BaseIdentity, writer: SlotWriter) -> Callable[[], float]:
    def measure() -> float:
        copy = root / "copy"
        began = time.perf_counter()
        with open_package(root / name, base=base, trusted_keys=None, into=copy) as package:
            writer.load(slot, package.ticket)
            report: Any = writer.wait(slot)
        seconds = time.perf_counter() - began
        if report["state"] != "done":
            raise RuntimeError(report["error"])
        shutil.rmtree(copy)
        return seconds

    return measure
