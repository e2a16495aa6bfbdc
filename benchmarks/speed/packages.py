"""Extracting, verifying and merging experts against copying the same bytes with the same promise to be on the disk."""

import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from packagekit import statement, write_model
from tqdm import tqdm

from flexgate.experts.checkpoint.base import base_identity
from flexgate.experts.checkpoint.layout import Architecture
from flexgate.experts.package.extract import extract_anchor, extract_expert
from flexgate.experts.package.merge import combine
from flexgate.experts.package.verify import open_package
from speed.compare import spread, take_turns
from speed.record import Run
from speed.statistics import Ratio, paired

STARTS = 5
AGAIN = "copy again"
_CONTEXT = multiprocessing.get_context("spawn")


def run(asked: Run) -> None:
    """Every operation takes turns with a copy of the bytes that it reads."""
    journal = asked.journal("packages")
    hidden = 256 if asked.quick else 2048
    architecture = Architecture(512, hidden, hidden * 43 // 16, 2, 4, 4, num_experts=3, num_experts_per_tok=2)
    with tempfile.TemporaryDirectory(prefix="flexgate-bench-") as directory:
        root = Path(directory)
        write_model(root / "model", architecture)
        extract_anchor(root / "model", root / "anchor")
        for index in (1, 2):
            extract_expert(root / "model", str(index), root / f"e{index}", statement=statement(f"e{index}"))
        starts, rounds = asked.starts or (2 if asked.quick else STARTS), asked.rounds or (2 if asked.quick else 5)
        for start in tqdm(range(starts), desc="processes"):
            if str(start) not in journal:
                with _CONTEXT.Pool(1) as process:
                    journal.add(str(start), process.apply(one_start, (str(root), rounds)))
    measured, itself = _report([journal[str(start)] for start in range(starts)])
    shape = {name: getattr(architecture, name) for name in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    what = (
        "bytes read per second divided by those of a copy of as many bytes, both on the disk before the clock stops; "
        "extracting reads shared tensors (to name the base model) and the expert, merging the anchor and two packages"
    )
    asked.write("packages", {"what": what, "starts": starts, "rounds": rounds, **measured}, shape=shape, itself=itself)
    journal.close()


def one_start(directory: str, rounds: int) -> dict[str, dict[str, Any]]:
    """Turns of a new process: megabytes per second of each operation, of a copy, and of the same copy again."""
    root = Path(directory)
    base = base_identity(root / "anchor")
    with tempfile.TemporaryDirectory(dir=root) as copies:
        opened = [
            open_package(root / f"e{index}", base=base, trusted_keys=None, into=Path(copies) / f"copy{index}")
            for index in (1, 2)
        ]
        anchor = [*(root / "anchor").glob("*.safetensors")]
        one = [root / "e1/expert.safetensors"]
        two = [*one, root / "e2/expert.safetensors"]
        jobs: dict[str, tuple[Callable[[Path], object], list[Path]]] = {
            "extract": (lambda to: extract_expert(root / "model", "1", to, statement=statement("e1")), [*anchor, *one]),
            "verify": (lambda to: open_package(root / "e1", base=base, trusted_keys=None, into=to).close(), one),
            "merge": (lambda to: combine(root / "anchor", opened, to, top_k=2), [*anchor, *two]),
        }
        found = {name: _turns(job, inputs, root, rounds) for name, (job, inputs) in jobs.items()}
        for package in opened:
            package.close()
    return found


def _turns(job: Callable[[Path], object], inputs: list[Path], root: Path, rounds: int) -> dict[str, Any]:
    count = sum(path.stat().st_size for path in inputs)
    copy = _timed(_copier(inputs), root, count)
    turns = take_turns({"ours": _timed(job, root, count), "copy": copy, AGAIN: copy}, rounds)
    return {"bytes": count, **turns}


def _report(starts: list[dict[str, dict[str, Any]]]) -> tuple[dict[str, Any], list[tuple[str, Ratio]]]:
    found: dict[str, Any] = {}
    itself = []
    for name in starts[0]:
        turns = {who: [start[name][who] for start in starts] for who in ("ours", "copy", AGAIN)}
        again = paired(turns[AGAIN], turns["copy"])
        itself.append((name, again))
        found[name] = {
            "bytes": starts[0][name]["bytes"],
            "ratio": paired(turns["ours"], turns["copy"]).report(),
            "copy again/copy": again.report(),
            "mb_per_s": spread([value for start in turns["ours"] for value in start]),
        }
    return found, itself


def _copier(inputs: list[Path]) -> Callable[[Path], None]:
    def copy(target: Path) -> None:
        target.mkdir()
        for number, path in enumerate(inputs):
            shutil.copyfile(path, target / str(number))
            descriptor = os.open(target / str(number), os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)

    return copy


def _timed(job: Callable[[Path], object], root: Path, count: int) -> Callable[[], float]:
    def measure() -> float:
        target = root / "target"
        began = time.perf_counter()
        job(target)
        speed = count / (time.perf_counter() - began) / 1e6
        shutil.rmtree(target)
        return speed

    return measure
