"""Extracting, verifying and merging experts against copying the same bytes with the same promise to be on the disk."""

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from packagekit import statement, write_model

from flexgate.experts.base import base_identity
from flexgate.experts.combine import combine
from flexgate.experts.extract import extract_anchor, extract_expert
from flexgate.experts.layout import Architecture
from flexgate.experts.verify import open_package
from speed.compare import ratio, spread, take_turns
from speed.record import write


def run(*, quick: bool, rounds: int | None, results: Path) -> None:
    """Every operation takes turns with a copy of the bytes that it reads."""
    hidden = 256 if quick else 2048
    architecture = Architecture(512, hidden, hidden * 43 // 16, 2, 4, 4, num_experts=3, num_experts_per_tok=2)
    with tempfile.TemporaryDirectory(prefix="flexgate-bench-") as directory:
        root = Path(directory)
        write_model(root / "model", architecture)
        extract_anchor(root / "model", root / "anchor")
        for index in (1, 2):
            extract_expert(root / "model", str(index), root / f"e{index}", statement=statement(f"e{index}"))
        measured = _measure(root, rounds or (2 if quick else 9))
    shape = {name: getattr(architecture, name) for name in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    what = (
        "bytes read per second divided by those of a copy of as many bytes, both on the disk before the clock stops; "
        "extracting reads shared tensors (to name the base model) and the expert, merging the anchor and two packages"
    )
    write("packages", {"what": what, **measured}, shape=shape, directory=results, rounds=rounds)


def _measure(root: Path, rounds: int) -> dict[str, Any]:
    base = base_identity(root / "anchor")
    opened = [
        open_package(root / f"e{index}", base=base, trusted_keys=None, into=root / f"copy{index}") for index in (1, 2)
    ]
    anchor = [*(root / "anchor").glob("*.safetensors")]
    one = [root / "e1/expert.safetensors"]
    two = [*one, root / "e2/expert.safetensors"]
    jobs: dict[str, tuple[Callable[[Path], object], list[Path]]] = {
        "extract": (lambda to: extract_expert(root / "model", "1", to, statement=statement("e1")), [*anchor, *one]),
        "verify": (lambda to: open_package(root / "e1", base=base, trusted_keys=None, into=to).close(), one),
        "merge": (lambda to: combine(root / "anchor", opened, to, top_k=2), [*anchor, *two]),
    }
    found: dict[str, Any] = {}
    for name, (job, inputs) in jobs.items():
        count = sum(path.stat().st_size for path in inputs)
        turns = take_turns({"ours": _timed(job, root, count), "copy": _timed(_copier(inputs), root, count)}, rounds)
        found[name] = {"bytes": count, "ratio": ratio(turns["ours"], turns["copy"]), "mb_per_s": spread(turns["ours"])}
    for package in opened:
        package.close()
    return found


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
