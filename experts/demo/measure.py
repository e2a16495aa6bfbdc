"""The probe matrix of a checkpoint directory: every gate, every domain, by completion and by chat."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tqdm import tqdm

from flexgate.experts.checkpoint.reader import read_checkpoint
from flexgate.experts.demo.corpus import SYSTEM_MESSAGES
from flexgate.experts.demo.evaluate import all_gates, answered
from flexgate.experts.demo.probes import Probe, read_probes
from flexgate.experts.demo.ship import PROBES_NAME, expert_ids, read_digests
from flexgate.experts.training.model import FlexOlmo

WORKERS = 2


def load(directory: Path) -> tuple[FlexOlmo, Tokenizer, tuple[str, ...]]:
    """Model in fp32, tokenizer and expert ids of a shipped checkpoint."""
    model = FlexOlmo.from_tensors(*read_checkpoint(directory))
    return model, Tokenizer.from_file(str(directory / "tokenizer.json")), expert_ids(directory)


def write_report(directory: Path, path: Path) -> dict[str, Any]:
    """Measure the whole matrix and write it as JSON."""
    experts, probes = expert_ids(directory), read_probes(directory / PROBES_NAME)
    everything = [(directory, gate, "") for gate in all_gates(experts)]
    with ProcessPoolExecutor(
        WORKERS, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        figures = list(
            tqdm(pool.map(measure, [*everything, (directory, experts, SYSTEM_MESSAGES[0])]), total=len(everything) + 1)
        )
    gates = {"+".join(gate): row for (_, gate, _), row in zip(everything, figures[:-1], strict=True)}
    report = {
        "command": "python -m flexgate.experts.demo --measure-only --report docs/results/demo-model.json",
        "device": platform.machine(),
        "torch": torch.__version__,
        "dtype": "bfloat16 weights, float32 arithmetic",
        "weights_sha256": read_digests(directory)["model.safetensors"],
        "experts": list(experts),
        "probes": {domain: sum(probe.domain == domain for probe in probes) for domain in experts},
        "training": _training(path, read_digests(directory)["model.safetensors"]),
        "summary": summarise(experts, gates),
        "gates": gates,
        "all_experts_with_system_message": figures[-1],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    return report


def write_training(path: Path, figures: Mapping[str, Any]) -> None:
    """Note what a training took, for the report on the weights that came out of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"training": figures}) + "\n")


def _training(path: Path, weights: str) -> dict[str, Any] | None:
    """What the training of these weights took, if the report knows."""
    figures: dict[str, Any] = json.loads(path.read_text()).get("training") or {} if path.is_file() else {}
    return figures if figures.get("weights_sha256") == weights else None


def measure(task: tuple[Path, tuple[str, ...], str]) -> dict[str, dict[str, float]]:
    """The figures of every domain under one gate; with a system message, of its chat probes."""
    directory, gate, system = task
    model, tokenizer, experts = load(directory)
    probes = [p for p in read_probes(directory / PROBES_NAME) if p.kind == "chat" or not system]
    return _by_domain(experts, probes, answered(model, tokenizer, experts, gate, probes, system))


def summarise(experts: Sequence[str], gates: dict[str, dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Per domain: the worst accuracy over gates that hold its expert, and the best over gates that lack it."""
    summary = {}
    for domain in experts:
        inside = [row[domain]["all"] for gate, row in gates.items() if domain in gate.split("+")]
        outside = [row[domain]["all"] for gate, row in gates.items() if domain not in gate.split("+")]
        summary[domain] = {"worst_with": min(inside), **({"best_without": max(outside)} if outside else {})}
    return summary


def report_lines(report: dict[str, Any]) -> Iterator[str]:
    """The matrix in percent, one gate a line."""
    experts = report["experts"]
    for gate, row in report["gates"].items():
        yield "  ".join(f"{domain} {row[domain]['all'] * 100:5.1f}" for domain in experts) + f"   {gate}"


def _by_domain(experts: Sequence[str], probes: Sequence[Probe], right: Sequence[bool]) -> dict[str, dict[str, float]]:
    return {
        domain: _figures([pair for pair in zip(probes, right, strict=True) if pair[0].domain == domain])
        for domain in experts
    }


def _figures(results: Sequence[tuple[Probe, bool]]) -> dict[str, float]:
    figures = {"all": _share(right for _, right in results)}
    for kind in ("chat", "completion"):
        for phrasing in ("seen", "paraphrase"):
            part = [right for probe, right in results if (probe.kind, probe.phrasing) == (kind, phrasing)]
            if part:
                figures[f"{kind}/{phrasing}"] = _share(part)
    return figures


def _share(right: Iterable[bool]) -> float:
    counted = list(right)
    return round(sum(counted) / max(len(counted), 1), 4)
